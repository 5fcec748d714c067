"""Plain NumPy and plain Python models of what kvjax computes, written from the papers and never from kvjax's code.

Everything here favours being obviously right over being fast: one sequence at a time, explicit lists of kept entries.
"""

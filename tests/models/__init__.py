"""Every attention variant against the NumPy oracle, and the properties that tie variants to one another."""

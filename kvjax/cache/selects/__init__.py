"""Selects: which of the entries held a step reads. One file each."""

from kvjax.cache.selects.protocol import Beside, Chosen, Cost, PageState, Select, View
from kvjax.cache.selects.quest import Quest
from kvjax.cache.selects.sparq import SparQ

__all__ = ["Beside", "Chosen", "Cost", "PageState", "Quest", "Select", "SparQ", "View"]

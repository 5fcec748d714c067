"""Checkpoints in and out of the Hugging Face layout, and models from one kind of attention to another."""

from kvjax.convert.cla import to_cla
from kvjax.convert.gqa import to_gqa
from kvjax.convert.mla import to_mla
from kvjax.convert.report import LayerReport, Report

__all__ = ["LayerReport", "Report", "to_cla", "to_gqa", "to_mla"]

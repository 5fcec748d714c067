"""Training: fine-tuning of any model, and the pieces that the demo model is trained with."""

from kvjax.train.api import finetune
from kvjax.train.batch import Batch
from kvjax.train.loop import Every, Told
from kvjax.train.settings import Distillation, DMCSchedule, LoRA, Settings

__all__ = ["Batch", "DMCSchedule", "Distillation", "Every", "LoRA", "Settings", "Told", "finetune"]

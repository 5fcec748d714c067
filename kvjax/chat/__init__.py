"""Conversations as prompts: a model's own chat template, rendered and tokenised."""

from kvjax.chat.prompt import chat_prompt, render_chat

__all__ = ["chat_prompt", "render_chat"]

"""What makes the inputs of a TokenFormer that reads text and images, in transformers' style."""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<image>"
# A message after the other, each image where it stands in its message; a language model that has never seen a chat
# reads nothing but the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


class TokenformerProcessor(ProcessorMixin):
    """Text with `<image>` in it, and images, to `input_ids`, `attention_mask` and `pixel_values`.

    Args:
        image_processor: of the vision model.
        tokenizer: of the language model, with an entry for `image_token`.
        chat_template: Jinja template of a chat. Default: the messages, a line each.
        image_positions: how many positions of a sequence an image takes.
        image_token: stands for an image in the text.

    Raises:
        ValueError: when it is called: a text has more or fewer `<image>` than there are images.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_positions: int = 1,
        image_token: str = IMAGE_TOKEN,
        **kwargs: Any,
    ) -> None:
        self.image_positions = image_positions
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the placeholders of an image."""
        return self.image_token * self.image_positions

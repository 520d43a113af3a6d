"""LoRA files that every tool opens, and the token file of this project."""

from .keys import check_layout as check_layout
from .lora_file import HUB_ERRORS as HUB_ERRORS
from .lora_file import Layout as Layout
from .lora_file import Style as Style
from .lora_file import base_metadata as base_metadata
from .lora_file import describe as describe
from .lora_file import find_lora as find_lora
from .lora_file import public_name as public_name
from .lora_file import read_lora as read_lora
from .lora_file import save_lora as save_lora
from .lora_file import standard_metadata as standard_metadata
from .lora_file import styled as styled
from .lora_file import with_own_words as with_own_words
from .tokens import is_tokens as is_tokens
from .tokens import read_tokens as read_tokens
from .tokens import save_tokens as save_tokens

"""What every worker of a language model imports; imported by the server that forks them."""

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama

import runner.worker

# transformers imports lazily: naming these is what loads them.
__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "modeling_llama", "runner"]

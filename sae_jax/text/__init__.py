"""Text: documents, tokens, contexts."""

from sae_jax.text.contexts import Packing as Packing
from sae_jax.text.opening import open_documents as open_documents
from sae_jax.text.tokenizer import load_tokenizer as load_tokenizer

"""tiny-vlm: a LLaVA of 4.3 million weights, trained on rendered scenes."""

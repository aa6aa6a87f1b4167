"""`tiny-lm-retrieval`: a small Llama that recalls facts, trained on 256 tokens."""

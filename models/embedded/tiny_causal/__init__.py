"""`tiny-causal`: the causal twin of `tiny-dllm`, of the same size and on the same data."""

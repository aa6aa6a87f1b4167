"""`tiny-dllm`: a masked-diffusion language model of arithmetic word problems."""

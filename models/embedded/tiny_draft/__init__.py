"""`tiny-draft`: a small draft model for SmolLM2-135M-Instruct, distilled from it."""

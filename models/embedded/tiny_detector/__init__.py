"""tiny-detector: tiny-vlm's architecture, taught to answer phrases with coordinate tokens."""

"""Low-rank weights with which tiny-detector writes coordinates in digits, and their recipe."""

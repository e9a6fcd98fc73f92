"""Weight-only quantization: schemes as data, applied to what the weight tables mark as quantizable."""

"""Proves an engine on real text: summaries scored with ROUGE, perplexity, distance to `transformers`."""

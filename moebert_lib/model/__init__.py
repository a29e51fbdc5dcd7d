"""MoEBERT as transformers models: expert layers, encoder families, conversion, faster forward."""

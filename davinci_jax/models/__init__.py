"""The decoder, its presets, its cost, decoding with a cache, and conversion to and from Hugging Face."""

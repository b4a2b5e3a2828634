"""Levels that a language model carries out, L4 to L6, and the annotations it gives: one engine, own prompts."""

"""Data Darwinism levels as operations on documents; so far L0 to L2 over text that every machine has."""

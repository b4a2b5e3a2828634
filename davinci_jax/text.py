"""What the tokenizers of data and of saved models must agree on."""

# Names of the token that ends a document, in the order in which they are tried.
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")

# How Qwen2 (arXiv 2407.10671) cuts text before merging bytes: contractions, words with one leading character, single
# digits, punctuation with the line breaks after it, blanks.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

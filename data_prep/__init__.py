"""Turns text into token shards: ``python -m data_prep tokenizer | text | pairs | labels | verify``."""

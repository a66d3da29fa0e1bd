"""Weights that come from and go back to the Hugging Face world.

family      what a family of theirs is: its config.json <-> our options; its tensors' names <-> ours
gpt2 llama starcoder2 bert bart t5    one family a file (llama: with Mistral and Qwen2; bart: with Marian and others)
families    the table of them; which one a config.json is of, which one our options fit
layout      where each tensor of ours lies in theirs: name, rows, transposed or not
pretrained  a folder that is read: ``Tensors`` under our names
writing     a folder that is written
"""

"""The same random model twice: ours and that of transformers, far from degenerate."""

import math

import torch
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, GPT2Config, GPT2LMHeadModel

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

BEGIN, END, PAD, VOCABULARY = 1, 2, 0, 90
SIZES = {"layers": 2, "heads": 2, "width": 32, "context": 64, "tied": False}


@torch.no_grad()
def shaken(model, seed: int, deviation: float):
    """Matrices N(0, deviation / sqrt(fan in)): a head that is not tied then gives texts that differ; some end."""
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = deviation / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else 0.2
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator) - parameter * (parameter.dim() == 2))
    return model.eval()


@torch.no_grad()
def decoders(seed: int = 1) -> tuple[Decoder, GPT2LMHeadModel]:
    ours = shaken(Decoder(TransformerOptions(**SIZES, activation="gelu_tanh"), VOCABULARY), seed, 2.0)
    bias = ours.norm.bias
    ours.head.weight[END] += 3 * bias / bias.square().sum()  # there is no bias of the head
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False,
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, attn_implementation="eager", dtype=torch.float32,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    theirs.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    body = theirs.transformer
    pairs = [(body.wte, ours.embedding), (body.wpe, ours.position), (body.ln_f, ours.norm), (theirs.lm_head, ours.head)]
    turned = []
    for layer, block in zip(body.h, ours.blocks, strict=True):
        pairs += [(layer.ln_1, block.attention_norm), (layer.ln_2, block.feed_forward_norm)]
        turned += [(layer.attn.c_attn, block.attention.qkv), (layer.attn.c_proj, block.attention.out)]
        turned += [(layer.mlp.c_fc, block.feed_forward.up), (layer.mlp.c_proj, block.feed_forward.out)]
    copy(pairs)
    copy(turned, turned=True)
    return ours, theirs


@torch.no_grad()
def encoder_decoders(seed: int = 10) -> tuple[Seq2Seq, BartForConditionalGeneration]:
    bart = {"norm_first": False, "embedding_norm": True, "position_offset": 2, "separate_positions": True}
    ours = shaken(Seq2Seq(TransformerOptions(**SIZES, **bart, head_bias=True), VOCABULARY), seed, 1.5)
    ours.head.bias[END] += 3
    for block in ours.blocks:  # or the source, always the same, would repeat one token for ever
        block.cross_attention.out.weight *= 0.2
    config = BartConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        tie_word_embeddings=False, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, forced_eos_token_id=None,
        decoder_start_token_id=BEGIN, attn_implementation="eager", dtype=torch.float32,
    )  # fmt: skip
    theirs = BartForConditionalGeneration(config).eval()
    theirs.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD, decoder_start_token_id=BEGIN)
    body = theirs.model
    theirs.final_logits_bias.copy_(ours.head.bias)
    theirs.lm_head.weight.copy_(ours.head.weight)
    sides = [
        (body.encoder, ours.encoder_position, ours.encoder_embedding_norm, ours.encoder_blocks),
        (body.decoder, ours.position, ours.embedding_norm, ours.blocks),
    ]
    for side, position, norm, blocks in sides:
        copy([(side.embed_tokens, ours.embedding), (side.embed_positions, position), (side.layernorm_embedding, norm)])
        for layer, block in zip(side.layers, blocks, strict=True):
            copy([(layer.self_attn_layer_norm, block.attention_norm), (layer.fc1, block.feed_forward.up)])
            copy([(layer.final_layer_norm, block.feed_forward_norm), (layer.fc2, block.feed_forward.out)])
            split(block.attention.qkv, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            copy([(layer.self_attn.out_proj, block.attention.out)])
            if side is body.decoder:
                split(block.cross_attention.kv, layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
                copy([(layer.encoder_attn.q_proj, block.cross_attention.q)])
                copy([(layer.encoder_attn.out_proj, block.cross_attention.out)])
                copy([(layer.encoder_attn_layer_norm, block.cross_attention_norm)])
    return ours, theirs


def copy(pairs, turned: bool = False) -> None:
    for theirs, ours in pairs:
        theirs.weight.copy_(ours.weight.T if turned else ours.weight)
        if getattr(theirs, "bias", None) is not None:
            theirs.bias.copy_(ours.bias)


def split(ours, *theirs) -> None:
    for part, weight, bias in zip(theirs, ours.weight.chunk(len(theirs)), ours.bias.chunk(len(theirs)), strict=True):
        part.weight.copy_(weight)
        part.bias.copy_(bias)

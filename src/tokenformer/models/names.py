"""Names in a TokenFormer, told without torch, so that its files can be read without it."""

BASE_GROUP = "base"
# Of the module in a linear map that holds the token groups beside it.
BESIDE = "param_tokens"
# Which maps of a block each count in the configuration speaks about: "qkv" tokens go to each of the three.
PROJECTIONS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "ffn": ("mlp",),
}
# Where a token group takes part in a model that reads both; BOTH: at images and at text after them.
TEXT, IMAGE, BOTH = MODALITIES = ("text", "image", "both")
# Parameter tokens, in each map, of the group that a merge by modality adds.
BRIDGE_TOKENS = 16

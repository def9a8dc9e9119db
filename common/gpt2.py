"""GPT-2's weights in and out, in the layout of transformers: config.json with model.safetensors or pytorch_model.bin."""

import json
from pathlib import Path

import torch

from common.config import UserError
from common.files import write_atomically


def parameter_names(layers):
    """{our name of a parameter: transformers', without its prefix "transformer."}"""
    modules = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
    for i in range(layers):
        modules |= {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for ours, theirs in (
            ("norm1", "ln_1"), ("attention.qkv", "attn.c_attn"), ("attention.out", "attn.c_proj"), ("norm2", "ln_2"),
            ("mlp.0", "mlp.c_fc"), ("mlp.2", "mlp.c_proj"))}
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")
            if kind == "weight" or theirs not in ("wte", "wpe")}


def is_transposed(name):
    """transformers' GPT-2 multiplies by weights (in, out), so its linear layers are stored transposed."""
    return name.startswith("blocks.") and ".norm" not in name and name.endswith(".weight")


# ---------------------------------------------------------------- in

def read(path, sizes):
    """As `read_mapped`, but the tensors do not change with the file."""
    config, weights = read_mapped(path, sizes)
    return config, {name: w.clone(memory_format=torch.contiguous_format) for name, w in weights.items()}


def read_mapped(path, sizes):
    """A folder or a file -> (fields of GPTConfig, {our name: tensor}). `sizes` are the shapes to try if config.json is
    missing (model.PRESETS). float64 stays, narrower types become float32. The tensors may be views of the file, mapped into
    memory. ValueError if it is not GPT-2's architecture."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    paths = [path] if path.is_file() else sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not paths:
        raise ValueError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    weights = {}
    for file in paths:
        weights |= read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    if (folder / "config.json").is_file():
        config = read_config(folder / "config.json")
    else:
        config = find_size(shapes, sizes, path)
    check_shapes(config, shapes, path)
    return config, rename(config, weights, path)


def rename(config, weights, path):
    """Weights under transformers' names -> under ours."""
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        raise ValueError(f"{path}: the unembedding lm_head is not the token embedding; here they are one")
    names = parameter_names(config["layers"])
    for name in weights.keys() - names.values():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # buffers: the causal mask
            raise ValueError(f"{path}: {name} has no place in GPT-2 with {config['layers']} layers")
    expected, ours = expected_shapes(config), {}
    for name, theirs in names.items():
        w = weights.get(theirs)
        if w is None:
            raise ValueError(f"{path}: {theirs} is missing")
        w = w.T if is_transposed(name) and w.dim() == 2 else w
        if tuple(w.shape) != expected(name) or not w.is_floating_point():
            raise ValueError(f"{path}: {theirs} is not of the shape or type that config.json asks for")
        ours[name] = w
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in ours.values()) else torch.float32
    return {name: w.to(dtype) for name, w in ours.items()}


def expected_shapes(config):
    """-> a function from our name of a parameter to its shape."""
    C = config["width"]
    shapes = {"tokens.weight": (config["vocab_size"], C), "positions.weight": (config["context"], C),
              "qkv.weight": (3 * C, C), "qkv.bias": (3 * C,), "out.weight": (C, C), "mlp.0.weight": (4 * C, C),
              "mlp.0.bias": (4 * C,), "mlp.2.weight": (C, 4 * C)}

    def shape(name):
        return next((shape for ending, shape in shapes.items() if name.endswith(ending)), (C,))
    return shape


def read_config(path):
    """config.json -> the fields of a GPTConfig."""
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        if c.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"model_type {c['model_type']} is not supported, only gpt2")
        config = dict(vocab_size=c["vocab_size"], context=c.get("n_positions", 1024), layers=c["n_layer"], heads=c["n_head"],
                      width=c["n_embd"])
        if any(type(n) is not int or n < 1 for n in config.values()):
            raise ValueError("sizes are whole numbers from 1")
        if config["width"] % config["heads"]:
            raise ValueError(f"width {config['width']} is not a multiple of heads {config['heads']}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no configuration of GPT-2 ({type(error).__name__}: {error})") from None
    supported = dict(activation_function=["gelu_new", "gelu_pytorch_tanh"], layer_norm_epsilon=[1e-5],
                     scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False], add_cross_attention=[False],
                     tie_word_embeddings=[True])
    for name, values in supported.items():
        if c.get(name, values[0]) not in values:
            raise ValueError(f"{path}: {name} {c[name]} is not supported, only {values[0]}")
    return config


def main_shapes(config):
    """The shapes that tell sizes apart, under transformers' names."""
    return {"wte.weight": (config["vocab_size"], config["width"]), "wpe.weight": (config["context"], config["width"]),
            f"h.{config['layers'] - 1}.ln_1.weight": (config["width"],)}


def find_size(shapes, sizes, path):
    """The named size that has weights of these shapes."""
    vocab_size = (*shapes.get("wte.weight", ()), 0)[0]
    for size in sizes.values():
        config = dict(vocab_size=vocab_size, **size)
        if main_shapes(config).items() <= shapes.items() and f"h.{config['layers']}.ln_1.weight" not in shapes:
            return config
    raise ValueError(f"{path}: config.json is missing beside it, and it is of no size known by name")


def check_shapes(config, shapes, path):
    """ValueError if the weights are not of the configuration's size, before anything of that size is allocated."""
    if config["layers"] > len(shapes):
        raise ValueError(f"{path}: its weights are not of {config['layers']} layers")
    for name, shape in main_shapes(config).items():
        if shapes.get(name, shape) != shape:
            raise ValueError(f"{path}: {name} is not of the shape that config.json asks for")
        if name not in shapes:
            raise ValueError(f"{path}: {name} is missing")


def read_safetensors(path):
    library = safetensors()
    try:
        return library.load_file(path)
    except (library.SafetensorError, ValueError, KeyError, RuntimeError):
        raise ValueError(f"{path} is cut short, damaged or no safetensors file") from None


def write_safetensors(path, weights):
    library = safetensors()
    try:
        library.save_file(weights, path, {"format": "pt"})
    except library.SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from None


def read_pickle(path):
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # no code in it is run
        weights = {name: w for name, w in weights.items() if isinstance(name, str) and isinstance(w, torch.Tensor)}
        if all(w.layout == torch.strided and w.device.type == "cpu" for w in weights.values()):
            return weights
    except Exception:  # torch raises many kinds
        pass
    raise ValueError(f"{path} is damaged or holds more than plain weights")


def safetensors():
    try:
        import safetensors.torch as library
        from safetensors import SafetensorError
    except ImportError:
        raise UserError("GPT-2's weights need the package safetensors: pip install safetensors") from None
    library.SafetensorError = SafetensorError
    return library


def resize_positions(weight, context):
    """Cut the position embeddings (T, C) to `context` positions, or extend them: new ones are random and must be learned."""
    kept = min(context, len(weight))
    positions = torch.randn(context, weight.shape[1]).to(weight) * weight.std()  # (context, C)
    positions[:kept] = weight[:kept]
    return positions


# ---------------------------------------------------------------- out

def write_policy(folder, model):
    """Write config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them."""
    write(folder, model.config, trunk_weights(model), architectures=["GPT2LMHeadModel"])


def write_scalar_model(folder, model):
    """Write config.json and model.safetensors, as transformers' GPT2ForSequenceClassification with one label reads them: its
    logit is the score at a text's last token, which must be the end of text.

    transformers finds that token as the last one that is no padding, so padding gets an id of its own after the vocabulary.
    Its head has no bias, so ours goes into the last norm's bias: w (h + b w / |w|^2) = w h + b."""
    weights, head = trunk_weights(model), model.head.weight.detach()  # (1, C)
    if not head.any():
        raise ValueError("the head's weights are all 0: nothing to fold its bias into")
    shift = model.head.bias.detach() * head[0] / head.square().sum()  # (C,)
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + shift
    padding = torch.zeros_like(model.tokens.weight[:1])
    weights["transformer.wte.weight"] = torch.cat([weights["transformer.wte.weight"], padding])  # (V + 1, C)
    write(folder, model.config, weights | {"score.weight": head}, architectures=["GPT2ForSequenceClassification"],
          vocab_size=model.config.vocab_size + 1, pad_token_id=model.config.vocab_size, id2label={"0": "score"},
          label2id={"score": 0})


def trunk_weights(model):
    """The trunk's parameters under transformers' names and in its shapes."""
    weights = model.state_dict()
    return {f"transformer.{theirs}": weights[ours].T if is_transposed(ours) else weights[ours]
            for ours, theirs in parameter_names(model.config.layers).items()}


def write(folder, config, weights, **more):
    end = config.end_of_text
    record = dict(model_type="gpt2", vocab_size=config.vocab_size, n_positions=config.context, n_ctx=config.context,
                  n_embd=config.width, n_layer=config.layers, n_head=config.heads, activation_function="gelu_new",
                  layer_norm_epsilon=1e-5, resid_pdrop=config.dropout, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end,
                  eos_token_id=end, tie_word_embeddings=True,
                  dtype=str(weights["transformer.wte.weight"].dtype).removeprefix("torch.")) | more
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    folder = Path(folder)
    write_atomically(folder / "model.safetensors", lambda path: write_safetensors(path, weights))
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))

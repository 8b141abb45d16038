"""Keys, pairs, alphas and metadata that a reader must not trust."""

from __future__ import annotations

import torch
from attack_cases import ALPHA, DOWN, FLAT, MODULE, UP, attack, folder, good, numbers, only, saved

ANY = ("inspect", "check", "convert")
FINE = ("inspect", "check", "port", "convert")
ESC, RLO = "\x1b[2J\x1b]0;owned\x07", "\u202e"


def odd(key: str) -> dict[str, torch.Tensor]:
    return {key: torch.ones(3)}


# --- keys: not understood, so that `port` refuses them by name and `inspect` lists them -------------------------------
for _name, _key, _shown in (
    ("a key that climbs out of the folder", "../../x", r"\.\./\.\./x"),
    ("a key that is an absolute path", "/etc/passwd", "/etc/passwd"),
    ("a key that is a drive", r"C:\Windows\x", "C:"),
    ("a key that Windows reserves", "CON", "CON"),
    ("a key with a zero byte", "a\x00b", r"a\\x00b"),
    ("a key that drives the terminal", f"x{ESC}y", r"x\\x1b\[2J\\x1b\]0;owned\\x07y"),
    ("a key with a line break", "a\nregraft: all is well", "a regraft: all is well"),
    ("a key with a carriage return", "a\rregraft: all is well", "a regraft: all is well"),
    ("a key with C1 controls", "a\x9b2J\x9d", r"a\\x9b2J\\x9d"),
    ("a key that turns the direction of text", f"a{RLO}gpj.exe", r"a\\u202egpj\.exe"),
    ("a key with line separators", "a\u2028b\u2029c", "a b c"),
    ("an empty key", "", ""),
    ("a key that is a dot", ".", r"\."),
    ("a key in markup", "[bold red]x[/]", r"\[bold red\]x\[/\]"),
    ("a key in broken markup", "x[/nothing]", r"x\[/nothing\]"),
    ("a key with a link in it", "[link=http://x]y[/link]", r"\[link=http://x\]"),
    ("a key with braces", "{0.__class__}", r"\{0\.__class__\}"),
    ("a key with percent signs", "%s%n%x", "%s%n%x"),
    ("a key of spaces", "   ", ""),
    ("a key in HTML", "<script>alert(1)</script>", "<script>"),
    ("a key of emoji", "🦙" * 20, "🦙"),
    ("a key of 1,000 letters", "k" * 1000, "k{100}…k{100}"),
    ("a Cyrillic look-alike of a key", UP.replace("o", "\u043e"), "l\u043era"),
    ("a full-width look-alike of a key", UP.replace("l", "\uff4c"), "\uff4c"),
    ("a key in other letter case", UP.upper(), "LORA_UNET"),
    ("a key with composed accents", "e\u0301", "e\u0301"),
):
    attack(_name, saved(odd(_key)), f"lora.safetensors.*{_shown}", verbs=("port",), fine=("inspect",))

attack("the ending of a key alone", only({".lora_down.weight": numbers(2, 8)}), "no known adapter format")
attack("the prefix of a key alone", only({"lora_unet_": numbers(2, 8)}), "lora_unet_", verbs=("port",))
attack(
    "keys that differ by case alone",
    saved({DOWN.upper(): numbers(2, 8), UP.upper(): numbers(8, 2)}),
    "LORA",
    verbs=("port",),
)
attack(
    "numbers in other scripts",
    only({"unet:\u0663:up": numbers(8, 2), "unet:3:up": numbers(8, 2), "unet:3:down": numbers(2, 8)}),
    "(second up of one module|not understood|matches no)",
    verbs=("port",),
)
attack("a module number of 900 digits", only({f"unet:{'9' * 900}:up": numbers(8, 2)}), "unet:999", verbs=("port",))
attack(
    "two spellings of one module",
    only(
        {
            f"unet.{MODULE}.{name}": tensor
            for name, tensor in (
                ("lora_A.weight", numbers(2, 8)),
                ("lora_B.weight", numbers(8, 2)),
                ("lora.down.weight", numbers(2, 8)),
                ("lora.up.weight", numbers(8, 2)),
            )
        }
    ),
    "is a second (up|down) of one module, beside .*keep one",
)

# --- pairs ------------------------------------------------------------------------------------------------------------
attack("no up", saved({UP: None}), f"{DOWN}: has no matching up tensor: half of the pair is missing. The file")
attack("no down", saved({DOWN: None}), f"{UP}: has no matching down tensor: half of the pair is missing. The file")
attack(
    "an alpha without its pair",
    saved({UP: None, DOWN: None}),
    f"{ALPHA}: .*has no update of a kind",
    verbs=("port",),
    fine=("inspect",),
)
attack(
    "ranks that differ", saved({DOWN: numbers(3, 8)}), rf"{UP}: rank mismatch: up \[8, 2\] has 2 .* 3 rows. The file"
)
attack(
    "halves the wrong way round",
    saved({UP: numbers(2, 8), DOWN: numbers(8, 2)}),
    "to_q: .*most of the adapter's modules do not fit it. Give the base",
    verbs=("port",),
    code=3,
)
attack("rank 0", saved({UP: numbers(8, 0), DOWN: numbers(0, 8)}), rf"{UP}: is empty: shape \[8, 0\]. Trained")
attack("no inputs", saved({DOWN: numbers(2, 0)}), rf"{DOWN}: is empty: shape \[2, 0\]. Trained")
attack(
    "a factor that is a vector", saved({UP: numbers(16)}), rf"{UP}: a factor must be a matrix .* shape \[16\]. The file"
)
attack(
    "a factor that is a scalar", saved({UP: torch.tensor(1.0)}), rf"{UP}: a factor must be a matrix .* shape \[\]. The"
)
attack("an up with a kernel", saved({UP: numbers(8, 2, 3, 3)}), f"{UP}: up must be a 1 × 1 kernel")
attack(
    "factors of seven dimensions",
    saved({DOWN: numbers(2, 8, 1, 1, 1, 1, 1)}),
    f"{DOWN}: must have 2 to 5 dimensions",
)
attack(
    "a rank above both dimensions",
    saved({UP: numbers(8, 20), DOWN: numbers(20, 8)}),
    verbs=(),
    fine=("inspect", "check", "port"),
)
attack(
    "another shape than the base's",
    saved({UP: numbers(9, 2)}),
    "to_q: .*most of the adapter's modules do not fit it. Give the base",
    verbs=("port",),
    fine=("inspect",),
    code=3,
)
for _word, _value in (("NaN", float("nan")), ("Inf", float("inf")), ("-Inf", -float("inf"))):
    _broken = numbers(8, 2)
    _broken[3, 1] = _value
    attack(
        f"{_word} in a factor",
        saved({UP: _broken}),
        f"{UP}: holds NaN or Inf. The file",
        verbs=("port", "convert"),
        fine=("inspect",),
    )
attack("denormal numbers", saved({UP: numbers(8, 2) * 1e-42}), verbs=(), fine=("inspect", "port", "convert"))
attack("a factor of zeros", saved({UP: torch.zeros(8, 2)}), verbs=(), fine=("inspect", "port", "convert"))

# --- alphas -----------------------------------------------------------------------------------------------------------
attack("no alpha", saved({ALPHA: None}), verbs=(), fine=FINE)
attack("alpha 0", saved({ALPHA: torch.tensor(0.0)}), verbs=(), fine=FINE)
attack("alpha in an integer", saved({ALPHA: torch.tensor(2)}), verbs=(), fine=FINE)
attack("alpha of one element in two dimensions", saved({ALPHA: torch.tensor([[2.0]])}), verbs=(), fine=FINE)
attack("a negative alpha", saved({ALPHA: torch.tensor(-2.0)}), verbs=(), fine=FINE)
attack("alpha NaN", saved({ALPHA: torch.tensor(float("nan"))}), f"{ALPHA}: alpha is NaN or Inf. The file")
attack("alpha Inf", saved({ALPHA: torch.tensor(float("inf"))}), f"{ALPHA}: alpha is NaN or Inf. The file")
attack(
    "alpha of two numbers",
    saved({ALPHA: torch.ones(2)}),
    rf"{ALPHA}: alpha must be one number, but has shape \[2\]. The",
)
attack(
    "alpha in a matrix",
    saved({ALPHA: torch.ones(2, 2)}),
    rf"{ALPHA}: alpha must be one number, but has shape \[2, 2\]. The",
)
attack(
    "alpha of no number", saved({ALPHA: torch.ones(0)}), rf"{ALPHA}: alpha must be one number, but has shape \[0\]. The"
)
attack("a complex alpha", saved({ALPHA: torch.tensor(1 + 2j)}), f"{ALPHA}: alpha is a complex number. The file")
attack("alpha 1e38", saved({ALPHA: torch.tensor(1e38)}), verbs=(), fine=("inspect", "check"))
attack("alpha 1e300", saved({ALPHA: torch.tensor(1e300, dtype=torch.float64)}), verbs=(), fine=("inspect",))

# --- DoRA -------------------------------------------------------------------------------------------------------------
DORA = f"{FLAT}.dora_scale"
attack(
    "a DoRA magnitude of integers",
    saved({DORA: torch.ones(8, 1, dtype=torch.int32)}),
    f"{DORA}: has dtype int32, not a float",
)
attack("a DoRA magnitude of another size", saved({DORA: torch.ones(5, 1)}), "lora.safetensors", verbs=("port",))
attack("a DoRA magnitude that is one number", saved({DORA: torch.tensor(1.0)}), "lora.safetensors", verbs=("port",))
attack(
    "NaN in a DoRA magnitude",
    saved({DORA: torch.full((8, 1), float("nan"))}),
    f"{DORA}: holds NaN or Inf",
    verbs=("port",),
)

# --- metadata ---------------------------------------------------------------------------------------------------------
for _name, _metadata in (
    ("metadata in HTML", {"ss_output_name": "<script>alert(1)</script><img src=x onerror=alert(2)>"}),
    ("metadata that drives the terminal", {f"ss_{ESC}": f"x{ESC}\r\x9b31m{RLO}"}),
    ("metadata in markup", {"[red]ss": "[/][link=http://x]y", "b": "[/"}),
    ("metadata of zero bytes", {"ss_x": "\x00" * 100}),
    ("metadata with an empty key", {"": ""}),
    (
        "metadata that is broken JSON",
        {"ss_tag_frequency": "{" * 5000, "ss_datasets": "[", "modelspec.hash_sha256": "0x"},
    ),
    ("metadata of false hashes", {"sshs_model_hash": "zz", "sshs_legacy_hash": "\x1b", "modelspec.hash_sha256": "no"}),
    ("metadata of false numbers", {"ss_network_dim": "-1", "ss_network_alpha": "NaN", "ss_v2": "perhaps"}),
    ("metadata of paths", {"ss_sd_model_name": "../../etc/passwd", "ss_vae_name": "\\\\server\\share"}),
    ("metadata in prototype's names", {"__proto__": "{}", "__class__": "x", "constructor": "y"}),
):
    attack(_name, saved({}, _metadata), verbs=(), fine=FINE)

_META = "lora_adapter_metadata"
_PAIR = {f"unet.{MODULE}.lora_A.weight": numbers(2, 8), f"unet.{MODULE}.lora_B.weight": numbers(8, 2)}
for _name, _text, _says in (
    ("diffusers metadata that is no JSON", "{", f"{_META}: is not a JSON object. Save"),
    ("diffusers metadata that is empty", "", f"{_META}: is not a JSON object. Save"),
    ("diffusers metadata that is a list", "[]", f"{_META}: is not a JSON object. Save"),
    ("diffusers metadata that is null", "null", f"{_META}: is not a JSON object. Save"),
    ("diffusers metadata 100,000 deep", "[" * 100_000, "(lora.safetensors: is a damaged|not a JSON object|too deep)"),
    ("diffusers metadata without alpha", '{"unet.r": 2}', f"{_META}: unet.lora_alpha: is missing. Give"),
    (
        "diffusers metadata with alpha NaN",
        '{"unet.r": 2, "unet.lora_alpha": NaN}',
        "unet.lora_alpha: must be a number, not nan",
    ),
    (
        "diffusers metadata with r in words",
        '{"unet.r": "two", "unet.lora_alpha": 2}',
        "unet.r: must be a number, not 'two'",
    ),
    (
        "diffusers metadata beyond all numbers",
        '{"unet.r": 1' + "0" * 400 + ', "unet.lora_alpha": 2}',
        "unet.r: must be a number",
    ),
    (
        "diffusers metadata with a pattern that looks back",
        '{"unet.r": 2, "unet.lora_alpha": 2, "unet.rank_pattern": {"(a)\\\\1": 2}}',
        "unet.rank_pattern: .* Give",
    ),
):
    attack(_name, only(_PAIR, {_META: _text}), _says, verbs=ANY)

# --- PEFT folders: the same in a module's name ------------------------------------------------------------------------
attack("a config beside the good weights", folder({}), verbs=(), fine=FINE)
attack("good weights", only(good()), verbs=(), fine=FINE)

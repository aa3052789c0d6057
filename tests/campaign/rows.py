"""The table of commands: a good line of each, its contradictions, and what of the general damage it rightly takes.

A new command needs one row here, and a new kind of file one in `material` (how a good one is made) and one in
`damages` (how it is broken). All else is derived: every file of a line is broken in every manner of its kind, every
output is put where none can be, every option gets values of no sense.
"""

from typing import NamedTuple

from .. import cases

MODEL = " ".join(
    ["--model vit_tiny_patch16_224", *(f"--model-kwargs {key}={value}" for key, value in cases.KWARGS.items())]
)


class Row(NamedTuple):
    """One command.

    Attributes:
        line: a good command line, its files as {kind}; an output is {out.SUFFIX}. Commands of a group are two words.
        others: more good lines, for files that the first has not.
        contradictions: what added to the line, or if it begins with "=" in its place, is refused.
        fine: (option, value) of `NONSENSE` that the command rightly takes.
        good: exit code of the line as it is; None where it takes minutes or tools that few machines have.
        loads: whether it takes a second or more, so that few of its cases are in the short campaign.
    """

    line: str
    others: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    fine: frozenset[tuple[str, str]] = frozenset()
    good: int | None = 0
    loads: bool = False


ROWS = {
    "onnx": Row(
        f"onnx {MODEL} --checkpoint {{checkpoint}} --r 8 -o {{out.onnx}}",
        others=(
            f"onnx {MODEL} --method diffrate --rates {{rates}} -o {{out.onnx}}",
            f"onnx {MODEL} --method dtps --at 1,3,4 --predictor {{layers}} -o {{out.onnx}}",
            f"onnx {MODEL} --r 8 --checkpoint {{torch}} -o {{out.onnx}}",
            f"onnx {MODEL} --r 8 --dtype int8 --for cpu --calib {{photos}} -o {{out.onnx}}",
            "onnx --r 8 --checkpoint {folder} -o {out.onnx}",
        ),
        contradictions=(
            "--pretrained",
            "--weights teacher",
            "--keep-rate 0.5",
            "--method none",
            "--method evit --at 9",
            "--method etps --r 8",
            "--method diffrate --rates deit_small@2.9",
            "--r 99",
            "--r -1",
            "--predictor {layers}",
            "--calib {photos}",
            "--dtype int8",
            "--dtype int8 --calib {photos}",
            "--batch 0",
            "--batch -1",
            "--batch 99999999999",
            "--opset 7",
            "--opset 99",
            "--model-kwargs depth=x",
            "--model-kwargs depth=0",
            "--model-kwargs img_size=-64",
            "--model-kwargs num_heads=5",
            "--model-kwargs embed_dim=0",
            "--model-kwargs checkpoint_path=w.pth",
            "--model-kwargs nothing",
            "--model resnet50",
            "--model hf-hub:nobody/nothing",
            "--model local-dir:nowhere",
            "--size 63x63",
            "--size 0x0",
            "--mean 1,2",
            "--std 0",
            "--std -1",
            "--std nan",
            "--crop-pct 0",
            "--crop-pct -1",
            "--crop-pct nan",
            "--crop-pct inf",
            "--pos-grid 3x3",
            "extra.onnx",
        ),
        fine=frozenset({("--seed", "-1"), ("--seed", "-7")}),
        loads=True,
    ),
    "inline": Row(
        "inline {calls} -o {out.onnx}", contradictions=("= inline {onnx} -o {out.onnx}", "more.onnx", "-o {calls}")
    ),
    "trt": Row(
        "trt {onnx} --dry-run",
        others=(
            "trt {onnx} --fp16 --compute-capability 89 --opt-level 0 -o {out.plan}",
            "trt {onnx} --dry-run --int8 --calib {photos}",
        ),
        contradictions=(
            "--fp16 --bf16",
            "--fp16 --fp32 --int8",
            "--calib {photos}",
            "--compute-capability 1",
            "--compute-capability 86,,89",
            "--batch 8:1:2",
            "--batch 0:1:2",
            "--batch 1:2",
            "--workspace 0",
            "--workspace 4XB",
            "--opt-level 9",
            "--embed-plugin",
            "--builder tensorrt --compute-capability 89",
        ),
        loads=True,
    ),
    "bundle": Row(
        "bundle {onnx} -o {out} --images {photos}",
        contradictions=("--count 0", "--count 99", "--runtime eager", "--checkpoint {checkpoint} --images nowhere"),
        loads=True,
    ),
    "verify": Row(
        "verify {onnx}",
        others=(
            "verify {bundle}",
            "verify {onnx} --images {photo}",
            "verify {onnx} --report {out.html}",
            "verify {trained} --checkpoint {checkpoint}",
            "verify {onnx} --against {beside}",
        ),
        contradictions=(
            "= verify {photos}",
            "= verify {bundle} {onnx}",
            "= verify {bundle} --images {photos}",
            "= verify {bundle} --bisect",
            "{dense} --report {out.html}",
            "--against {dense}",
            "--checkpoint {layers}",
            "--runtime eager,ort",
        ),
        loads=True,
    ),
    "inspect": Row(
        "inspect {onnx}",
        others=("inspect {beside}", "inspect {plan}", "inspect {calls}", "inspect {bundle}"),
        contradictions=("{dense}", "= inspect {checkpoint}", "= inspect {photo}", "= inspect {photos}"),
    ),
    "run": Row(
        "run {onnx} {photo}",
        others=("run {onnx} {photos}", "run {beside} {photo}"),
        contradictions=("= run {photo} {onnx}", "= run {plan} {photo}", "--runtime ort,openvino"),
    ),
    "viz": Row(
        "viz {onnx} {photo} -o {out.png}",
        contradictions=(
            "--at 99",
            "--at 1,x",
            "--at -1",
            "-o picture.jpg",
            "-o {photo} --force",
            "-o {onnx} --force",
            "= viz {dense} {photo} -o {out.png}",
        ),
    ),
    "eval": Row(
        "eval {onnx} --images {labelled} --no-reference",
        others=("eval {trained} --images {labelled} --checkpoint {checkpoint}",),
        contradictions=(
            "--limit 0",
            "--limit -3",
            "--checkpoint {checkpoint}",
            "= eval {headless} --images {labelled} --no-reference",
        ),
        fine=frozenset({("--limit", "9" * 30)}),
    ),
    "bench": Row(
        "bench {onnx} --dense {dense} --runtime ort --batch 1 --seconds 0.05",
        others=("bench {onnx} --dense {dense} --batch 1 --seconds 0.05 --plot {out.png}",),
        contradictions=(
            "--dense {onnx}",
            "--dense {headless}",
            "--batch 0",
            "--batch 1,x",
            "--batch -1",
            "--seconds 0",
            "--seconds -1",
            "--seconds nan",
            "--seconds inf",
            "--threads -1",
            "--processes 0",
            "--images {photos}",
            "--sweep r=x",
            "--sweep keep=1",
            "--sweep r=",
            "--cuda-graph",
            "--plot picture.jpg",
            "--runtime ort,",
            "= bench {plan} --seconds 0.05",
        ),
        loads=True,
    ),
    "rates": Row("rates", contradictions=("nothing", "--depth 3")),
    "rates learn": Row(
        f"rates learn {MODEL} --checkpoint {{checkpoint}} --images {{photos}} --macs 10M --steps 2 -o {{out.json}}",
        contradictions=(
            "--macs 0G",
            "--macs 999G",
            "--macs -1M",
            "--macs 1M",
            "--labels",
            "--steps 0",
            "--steps -1",
            "--step-images 0",
            "--step-images 1000",
            "--pretrained",
        ),
        fine=frozenset({("--seed", "-1"), ("--seed", "-7")}),
        loads=True,
    ),
    "tune": Row(
        f"tune {MODEL} --checkpoint {{checkpoint}} --images {{photos}} --speedup 1.01 --methods tome --seconds 0.1 -o {{out.onnx}}",
        others=(
            f"tune {MODEL} --rates {{rates}} --methods diffrate --images {{photos}} --macs 9M --seconds 0.1 -o {{out.onnx}}",
        ),
        contradictions=(
            "--latency-ms 5",
            "--macs 5M",
            "--labels",
            "--limit 0",
            "--methods none",
            "--methods tomo",
            "--dtype int8",
            "--batch 0",
            "--seconds -1",
            "--report {out.onnx}",
            "--pretrained",
            "--images nowhere",
        ),
        good=None,
        fine=frozenset({("--seed", "-1"), ("--seed", "-7"), ("--limit", "9" * 30)}),
        loads=True,
    ),
    "ladder": Row(
        f"ladder {MODEL} --checkpoint {{checkpoint}} --sweep r=0,8 --seconds 0.1 -o {{out}}",
        contradictions=(
            "--sweep r=",
            "--sweep keep=1",
            "--sweep r=x",
            "--method evit",
            "--from {onnx}",
            "--batch -1",
            "--seconds -1",
            "--images nowhere",
            "--pretrained",
        ),
        good=None,
        fine=frozenset({("--seed", "-1"), ("--seed", "-7")}),
        loads=True,
    ),
    "embed": Row(
        "embed {onnx} --images {photos} -o {out} --workers 1",
        others=("embed {bundle} --images {photos} -o {out} --workers 1",),
        contradictions=(
            "--columns nothing",
            "--top 0",
            "--top 99",
            "--part-size 0",
            "--workers -1",
            "--machines 4",
            "--actors 2",
            "--estimate 0",
            "--images nowhere",
            "= embed {onnx} --images {photos}",
            "= embed {photos} --images {photos} -o {out}",
        ),
        loads=True,
    ),
    "serve-repo": Row(
        "serve-repo {bundle} -o {out}",
        contradictions=(
            "--backend tensorrt",
            "--backend nothing",
            "--instances 0",
            "--max-batch 0",
            "--threads -1",
            "--device gpu --backend openvino",
            "--latency {photo}",
            "--storage s3://x",
            "= serve-repo {onnx} -o {out}",
            "= serve-repo {bundle} {bundle} -o {out}",
        ),
    ),
    "env": Row("env", contradictions=("nothing", "--verbose")),
    "plugin": Row("plugin", good=None, contradictions=("= plugin nothing", "= plugin --json")),
    "plugin build": Row(
        "plugin build",
        good=None,
        contradictions=(
            "--arch x",
            "--arch 86,",
            "--arch 1",
            "--cpu --arch 86",
            "--march native",
            "--runtime ort",
            "--cpu --runtime eager",
            "--cpu --runtime ,",
            "--cpu --onnxruntime-include nowhere --runtime ort",
            "--tensorrt-include nowhere",
            "--cpu --runtime ort --march no-such-processor",
        ),
    ),
    "plugin path": Row(
        "plugin path", good=2, contradictions=("--force", "nothing", "= plugin path", "= plugin path --cpu")
    ),
    "demo": Row(
        "demo --offline -o {out}",
        contradictions=("-o {photos}", "-o {photo}", "-o {photo}/x", "nothing"),
        good=None,
        loads=True,
    ),
}

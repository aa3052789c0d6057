"""The node `tokexport::TokenReduce`, version 1: one reduction of tokens, whole, as an operator of its own. Imports nothing heavy.

This page is the contract. The ONNX function that travels in a file, the PyTorch twin (`twin.py`), the GPU kernels (`triton/`), the
TensorRT plugin (`plugin/`) and the operators of ONNX Runtime and OpenVINO (`cpu/`) are all this and nothing else.

Inputs, for B images of N tokens with C channels, prefix tokens first:
    x       [B, N, C], or [N, C] for one image: the tokens; float32, float16 or bfloat16.
    signal  what decides. select = "pairs": keys [B, H, N, D] in the type of x, as the attention has them; H = 1 for a metric that is
            no key. select = "score": [B, N, 1] or [N, 1] float32, prefix tokens lifted above all others.
    size    [B, N, 1] or [N, 1] float32, above zero: input tokens each token stands for; only with a fold that follows sizes.
Outputs; ranks follow x, K' = K, or K + 1 with fold = "sum":
    x         [B, K', C] in the type of x.
    size      [B, K', 1] float32, with sizes >= 1.
    log_size  [B, 1, 1, K'] float32, its logarithm as attention adds it, with sizes = 2.
    keep      [B, K, 1] int64: the input rows that stay, in output order; with decisions = 1, as the two below.
    src       [B, R, 1] int64: the input rows that are folded, unless fold = "drop".
    dst       [B, R, 1] int64: the host each of them goes to, unless fold is "drop" or "sum": under "pairs" its place in B, which
              is output row first_host + dst, under "score" the output row itself.
An output that is not asked for is not in the list: sizes = 0, decisions = 0 has one. What nobody reads is not computed.

What is decided:
    select = "pairs"  Even positions from n_prefix on are A, odd ones B. The metric of a token is the mean of its keys over heads (the
            sum in ascending order, divided by H), divided by its L2 norm; one of zeros stays zeros. Each A token finds its best B token
            by dot product, the lower position of equals. The R = N - K best pairs merge: order by score descending, position ascending,
            which is the order of src. Rows that stay: prefix, A tokens left, B tokens. A tokens left are in ascending position, or with
            by_score = 1 in descending score.
    select = "score"  Tokens in descending score, the lower position first of equals. The first K stay, the next R are folded, the rest
            is dropped. Hosts (folds "mean" and "squeeze"): the kept token past the prefix whose x has the largest cosine, each row
            divided by its norm + eps; the earlier of equals.
What is done with folded rows, all in float32; c is the cosine with the host, weights of row and host are
    fold = "size_mean"  their sizes: x the weighted mean, size the sum.
    fold = "mean"       1 and 1: x the plain mean; size grows by size * c of each, never below 2^-100.
    fold = "squeeze"    exp(c - 1) and 1: x the weighted mean.
    fold = "sum"        the raw scores, all into one row behind the kept: the weighted sum.
    fold = "drop"       nothing: they go. Sizes, if followed, are the kept rows' own.
A row that receives nothing is copied bit for bit. -0 equals +0. Values that are not finite are refused where the caller can be told
(PyTorch), and elsewhere give some valid rows, never a read outside the input.

Example, select = "pairs", fold = "size_mean", N = 5, K = 4, n_prefix = 1: A is rows 2 and 4, B is 1 and 3. If 4 is nearest to 1 and
that pair is the best, keep = 0, 2, 1, 3, src = 4, dst = 0 (row 1 is the first of B), and output row 2 is the mean of rows 1 and 4.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

NAME, DOMAIN, VERSION = "TokenReduce", "tokexport", 1
SELECTS = ("pairs", "score")
FOLDS = ("size_mean", "mean", "squeeze", "sum", "drop")
FOLLOWS_SIZES = ("size_mean", "mean")
SMALLEST_SIZE = 2.0**-100  # its logarithm, -69, takes a token out of the attention, finitely


@dataclass(frozen=True)
class Pairing:
    """Positions of A and B under select = "pairs": `a_first`, `a_first` + 2, ... (`n_a` of them), and the same for B."""

    a_first: int
    n_a: int
    b_first: int
    n_b: int


@dataclass(frozen=True)
class Reduction:
    """The attributes of one node; see above. Counts are per image.

    Attributes:
        select: "pairs" or "score".
        fold: one of FOLDS.
        n_in, n_kept, n_folded: N, K and R. Under "pairs" R is N - K, or 0 with fold = "drop".
        n_prefix: tokens in front that neither merge nor receive.
        by_score: 1 when A tokens left are in descending score ("pairs" only).
        eps: added to each norm ("score" only).
        sizes: 0 no sizes out, 1 size, 2 size and log_size.
        decisions: 1 for keep, src and dst.
    """

    select: str
    fold: str
    n_in: int
    n_kept: int
    n_folded: int
    n_prefix: int
    by_score: int = 0
    eps: float = 0.0
    sizes: int = 0
    decisions: int = 0

    def __post_init__(self):
        problem = _problem(self)
        if problem:
            raise ValueError(f"{NAME} {asdict(self)}: {problem}")

    @property
    def n_out(self) -> int:
        """Rows that come out."""
        return self.n_kept + (self.fold == "sum")

    @property
    def has_size(self) -> bool:
        """Whether the node takes sizes."""
        return self.sizes > 0 or self.fold == "size_mean"

    @property
    def pairing(self) -> Pairing:
        """Who is A and who is B."""
        p, odd = self.n_prefix, self.n_prefix % 2
        a, b = p + odd, p + 1 - odd
        return Pairing(a, len(range(a, self.n_in, 2)), b, len(range(b, self.n_in, 2)))

    @property
    def first_host(self) -> int:
        """Output row of the host that dst calls 0."""
        return self.n_kept - self.pairing.n_b if self.select == "pairs" else 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the node gives, in order."""
        folded = () if self.fold == "drop" else ("src",) if self.fold == "sum" else ("src", "dst")
        return ("x", *("size", "log_size")[: self.sizes], *(("keep", *folded) if self.decisions else ()))

    @property
    def attributes(self) -> dict[str, int | float | str]:
        """The ONNX attributes, by name."""
        return asdict(self)


def _problem(op: Reduction) -> str | None:
    """What is wrong with a node's attributes, in words; None for nothing."""
    if op.select not in SELECTS:
        return f"select is one of {', '.join(SELECTS)}"
    if op.fold not in FOLDS:
        return f"fold is one of {', '.join(FOLDS)}"
    if not 0 <= op.n_prefix <= op.n_kept < op.n_in:
        return "0 <= n_prefix <= n_kept < n_in"
    if op.select == "pairs":
        pairing = op.pairing
        if op.fold not in ("size_mean", "drop"):
            return 'select "pairs" folds by "size_mean" or "drop"'
        if op.n_folded != (0 if op.fold == "drop" else op.n_in - op.n_kept):
            return 'select "pairs" folds all that is not kept, and nothing with "drop"'
        if op.n_in - op.n_kept > (pairing.n_a if pairing.n_b else 0):
            return f"only {pairing.n_a} tokens may merge"
    elif op.by_score:
        return 'by_score goes with select "pairs"'
    elif op.fold == "size_mean":
        return 'fold "size_mean" goes with select "pairs"'
    elif not (op.n_folded == 0 if op.fold == "drop" else 1 <= op.n_folded <= op.n_in - op.n_kept):
        return "n_folded is 1 to n_in - n_kept, and 0 with fold drop"
    elif op.fold in ("mean", "squeeze") and op.n_kept == op.n_prefix:
        return "no kept token may receive: n_kept is n_prefix"
    if op.sizes not in (0, 1, 2) or op.sizes and op.fold in ("squeeze", "sum"):
        return "sizes is 0, 1 or 2, and 0 with fold squeeze or sum"
    if not op.eps >= 0 or op.by_score not in (0, 1) or op.decisions not in (0, 1):
        return "eps is not negative; by_score and decisions are 0 or 1"
    return None

"""Types of the native module; built from csrc/ by CMake."""

import numpy as np
import numpy.typing as npt

def best_isa() -> str: ...
def current_isa() -> str: ...
def set_isa(cap: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def read_all(data: npt.NDArray[np.uint8]) -> int: ...
def rotate_quantize(
    x: int,
    signs: npt.NDArray[np.float32],
    tokens: int,
    columns: int,
    block: int,
    q: int,
    scale: int,
    sum: int,
    /,
) -> None: ...
def experts(
    gate_up: Trellis,
    down: Trellis,
    hidden: int,
    expert_ids: int,
    weights: int,
    tokens: int,
    chosen: int,
    out: int,
    /,
) -> None: ...
def mlp(gate: Trellis, up: Trellis, down: Trellis, x: int, tokens: int, out: int, /) -> None: ...
def qkv(
    q: Trellis,
    k: Trellis,
    v: Trellis,
    x: int,
    tokens: int,
    head_dim: int,
    cos: int,
    sin: int,
    query: int,
    key: int,
    value: int,
    /,
) -> None: ...
def route(
    x: int,
    router: int,
    bias: int,
    tokens: int,
    width: int,
    num_experts: int,
    chosen: int,
    norm_min: float,
    expert_ids: int,
    weights: int,
    /,
) -> None: ...
def paged_attention(
    query: int,
    key: int,
    value: int,
    key_scale: int,
    value_scale: int,
    stored: int,
    pages: int,
    table_width: int,
    page_size: int,
    sequence: int,
    num_keys: int,
    tokens: int,
    num_heads: int,
    groups: int,
    head_dim: int,
    out: int,
    /,
) -> None: ...
def rmsnorm(x: int, weight: int, eps: float, tokens: int, width: int, out: int, /) -> None: ...
def viterbi_encode(
    targets: npt.NDArray[np.uint16],
    columns: npt.NDArray[np.uint8],
    levels: npt.NDArray[np.uint16],
    bits: int,
    seam_steps: int,
    num_threads: int,
    isa: str,
) -> npt.NDArray[np.uint8]: ...

class Trellis:
    def __init__(
        self,
        bits: int,
        code_columns: npt.NDArray[np.uint8],
        codebook: npt.NDArray[np.int8],
        unit: float,
        codes: npt.NDArray[np.uint8],
        row_scale: npt.NDArray[np.uint16],
        count: int,
        rows: int,
        columns: int,
        chain: int,
        block: int,
        signs: npt.NDArray[np.float32],
    ) -> None: ...
    def linear(self, expert: int, x: int, tokens: int, y: int) -> None: ...

class Integers:
    def __init__(
        self,
        codes: npt.NDArray[np.uint8],
        row_scale: npt.NDArray[np.uint16],
        bits: int,
        block: int,
        signs: npt.NDArray[np.float32],
    ) -> None: ...
    def linear(self, x: int, tokens: int, y: int) -> None: ...
    def rows(self, ids: int, count: int, out: int) -> None: ...

class Norm:
    def __init__(
        self, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], eps: float
    ) -> None: ...

def frame_attention(
    query: int,
    key: int,
    value: int,
    lengths: npt.NDArray[np.int64],
    num_heads: int,
    head_dim: int,
    is_rounded: bool,
    out: int,
    /,
) -> None: ...

class Dense:
    def __init__(
        self, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32] | None, form: int
    ) -> None: ...
    def linear(self, x: int, tokens: int, y: int) -> None: ...

class VisionBlock:
    def __init__(
        self,
        norms: tuple[Norm, ...],
        matrices: tuple[Integers | Dense, ...],
        biases: tuple[npt.NDArray[np.float32], ...],
    ) -> None: ...
    def attention(
        self, hidden: int, cos: int, sin: int, lengths: npt.NDArray[np.int64], num_heads: int, /
    ) -> None: ...
    def mlp(self, hidden: int, patches: int, /) -> None: ...

class Tower:
    def __init__(self, blocks: list[VisionBlock], num_heads: int) -> None: ...
    def run_blocks(self, hidden: int, cos: int, sin: int, lengths: npt.NDArray[np.int64], /) -> None: ...

class DenseVisionBlock(VisionBlock): ...

class DenseTower(Tower):
    def set_ends(self, embed: Dense, norm: Norm) -> None: ...
    def run(self, patches: int, cos: int, sin: int, lengths: npt.NDArray[np.int64], out: int, /) -> None: ...

class DenseResampler:
    def __init__(
        self,
        spatial: tuple[Dense, Dense, Norm],
        temporal: tuple[Dense, Dense, Norm],
        project: Dense,
        norm: npt.NDArray[np.float32],
        eps: float,
    ) -> None: ...
    def run(
        self,
        blocks: int,
        num_blocks: int,
        earlier: npt.NDArray[np.int64],
        later: npt.NDArray[np.int64],
        out: int,
        /,
    ) -> None: ...

Matrix = Trellis | Dense
Bank = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Matrix, Matrix]

class Decoder:
    def __init__(
        self,
        norm: npt.NDArray[np.float32],
        width: int,
        num_heads: int,
        groups: int,
        head_dim: int,
        chosen: int,
        eps: float,
        norm_min: float,
    ) -> None: ...
    def add_layer(
        self,
        norms: tuple[npt.NDArray[np.float32], ...],
        attention: tuple[Matrix, ...],
        text: Bank | None,
        vision: Bank | None,
        mlp: tuple[Matrix, ...] | None,
    ) -> None: ...
    def run(
        self,
        hidden: int,
        out: int,
        tokens: int,
        angles: tuple[int, ...],
        store: tuple[int, ...],
        table: tuple[int, ...],
        rows: tuple[int, ...],
        expert_ids: int,
        /,
    ) -> bool: ...

class DenseDecoder(Decoder):
    def set_ends(self, embedding: npt.NDArray[np.float32], head: Dense) -> None: ...
    def next(
        self,
        sequences: int,
        ids: int,
        positions: int,
        num_keys: int,
        angles: tuple[int, int, int],
        store: tuple[int, ...],
        table: tuple[int, int],
        logits: int,
        likeliest: int,
        /,
    ) -> bool: ...

class train:
    """csrc/train.hpp by address; `duomo.kernels.cpu.train` knows the shapes."""

    @staticmethod
    def is_there() -> bool: ...
    @staticmethod
    def product(
        ends: int,
        experts: int,
        outputs: int,
        inputs: int,
        rows: int,
        x: int,
        weight: int,
        y: int,
        is_rounded: bool,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def product_by_input(
        ends: int,
        experts: int,
        outputs: int,
        inputs: int,
        weight: int,
        by_y: int,
        by_x: int,
        is_rounded: bool,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def product_by_weight(
        ends: int,
        experts: int,
        outputs: int,
        inputs: int,
        rows: int,
        x: int,
        by_y: int,
        by_weight: int,
        is_rounded: bool,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def attention(
        lengths: npt.NDArray[np.int64],
        heads: int,
        groups: int,
        dim: int,
        is_causal: bool,
        blocks: int,
        query: int,
        key: int,
        value: int,
        out: int,
        lse: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def attention_backward(
        lengths: npt.NDArray[np.int64],
        heads: int,
        groups: int,
        dim: int,
        is_causal: bool,
        blocks: int,
        query: int,
        key: int,
        value: int,
        out: int,
        lse: int,
        by_out: int,
        by_query: int,
        by_key: int,
        by_value: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def rmsnorm(
        x: int, weight: int, eps: float, tokens: int, width: int, y: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def rmsnorm_backward(
        x: int,
        weight: int,
        eps: float,
        by_y: int,
        tokens: int,
        width: int,
        by_x: int,
        by_weight: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def rotate(
        x: int, cos: int, sin: int, sign: float, tokens: int, heads: int, dim: int, y: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def swiglu(gate: int, up: int, stride: int, rows: int, width: int, y: int, threads: int, /) -> None: ...
    @staticmethod
    def swiglu_backward(
        gate: int,
        up: int,
        stride: int,
        by_y: int,
        rows: int,
        width: int,
        by_gate: int,
        by_up: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def combine(
        rows: int, place: int, weights: int, tokens: int, chosen: int, width: int, out: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def combine_backward(
        rows: int,
        place: int,
        weights: int,
        by_out: int,
        tokens: int,
        chosen: int,
        width: int,
        by_rows: int,
        by_weights: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def route(
        logits: int,
        bias: int,
        norm_min: float,
        tokens: int,
        experts: int,
        chosen: int,
        p: int,
        ids: int,
        weights: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def route_backward(
        p: int,
        ids: int,
        weights: int,
        by_weights: int,
        norm_min: float,
        tokens: int,
        experts: int,
        chosen: int,
        by_logits: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def cross_entropy(
        logits: int, labels: int, tokens: int, words: int, loss: int, lse: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def cross_entropy_backward(
        logits: int,
        labels: int,
        lse: int,
        by_loss: int,
        tokens: int,
        words: int,
        by_logits: int,
        threads: int,
        /,
    ) -> None: ...

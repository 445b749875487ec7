"""Every number a person may choose, as frozen dataclasses with units in the field docs.

`runtime_only` marks fields that may differ between runs without changing what is computed (threads, logging, the run
directory). Stages depend on all others, which are compared before an artifact is used again.
"""

from dataclasses import dataclass
from typing import Literal

from lgp_dist.config.budget import Budget
from lgp_dist.config.data_config import AugmentConfig as AugmentConfig
from lgp_dist.config.data_config import DataConfig, runtime_only

Precision = Literal["fp32", "bf16", "fp16"]
AncestryPrecision = Literal["engine", "fp32", "bf16", "fp16"]
Levels = Literal["none", "last", "dense"]
RowSource = Literal["distil", "labels", "hub", "file", "tail", "random"]
StitchInit = Literal["transformation", "transformation_paper", "transformation_pinv", "least_squares", "random"]
Policy = Literal["independent", "shared", "spread", "balanced"]
LossScale = Literal["sample", "paper"]
StitchSharing = Literal["window", "path"]
RowStart = Literal["random", "ancestry"]
Ops = Literal["auto", "fused", "compiled", "reference"]
Format = Literal["pt2", "onnx", "int8"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run of the loop."""

    epochs: float = 100.0
    """Passes over the training split."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0 for no limit. The schedule shrinks to fit."""
    batch_size: int = 128
    """Images per optimizer step, over all ranks and micro-steps."""
    accumulate: int = 1
    """Micro-steps per optimizer step."""
    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 5.0
    """Linear warm-up from min_lr, epochs."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.05
    """Decay of matrices; vectors, tokens and transformations have none."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 0.0
    """Largest gradient norm; 0 for no clipping."""
    ema: float = 0.0
    """Decay per update of an exponential moving average of the weights, which the stage hands on in their place; 0 for
    none. The average of a weight moves only in steps that update the weight."""
    mixup: float = 0.0
    """Mixup's alpha; 0 for none."""
    cutmix: float = 0.0
    """CutMix's alpha; 0 for none."""
    label_smoothing: float = 0.0
    """Weight that is spread over all classes."""
    log_every: int = runtime_only(20)
    """Optimizer steps between two writes of the log."""


@dataclass(frozen=True)
class EngineConfig:
    """How the work is computed."""

    precision: Precision = "bf16"
    """bf16 and fp16 keep parameters, gradients and optimizer in fp32 and compute under autocast; fp16 scales losses."""
    fp16_scale: float = runtime_only(2.0**16)
    """fp16's first loss scale; it halves after an overflow and doubles after 2,000 steps without one."""
    activation_checkpointing: Literal["auto", "on", "off"] = runtime_only("auto")
    """Compute activations again in backward. auto does so under ZeRO-3 alone, where they would keep whole weights."""
    compile: str = runtime_only("")
    """torch.compile's backend for every block, such as inductor or cudagraphs; empty for none."""
    ops: Ops = runtime_only("auto")
    """How the pool computes a stitch with the block that it enters, and a block's residual add with its norm: reference
    (as timm does), fused (one operation each; kernels on GPUs), compiled (by torch.compile), auto (fused on cards on
    which benchmarks/ shows it ahead, else reference)."""
    offload_optimizer: bool = runtime_only(False)
    """Keep and step the optimizer on the CPU (ZeRO stages 1 to 3)."""
    reduction: Literal["all", "union"] = runtime_only("all")
    """Gradients that ranks exchange: all; or, once per step, only those that some rank used (ZeRO stages 1 and 2)."""
    audit: bool = runtime_only(True)
    """Compare order of gradients and schedule over ranks before every optimizer step, and stop at a difference."""
    audit_weights_every: int = runtime_only(500)
    """Optimizer steps between two comparisons of all weights over ranks, beside the first; 0 for none."""
    device: Literal["auto", "cpu", "cuda"] = runtime_only("auto")
    """auto takes the GPU if there is one."""
    threads: int = runtime_only(0)
    """CPU threads per rank; 0 shares the machine's cores between its ranks."""

    def ancestry(self, precision: AncestryPrecision) -> Precision:
        """What the ancestry's forwards are computed in."""
        return self.precision if precision == "engine" else precision


@dataclass(frozen=True)
class RowConfig:
    """One row of the pool: an auxiliary model."""

    width: int
    """Embedding width of every block."""
    heads: int
    """Attention heads."""
    levels: Levels = "none"
    """Which blocks are distilled: none, the last, or three levels (dense)."""
    drop_path: float = 0.0
    """Largest stochastic-depth rate in stage distil."""
    source: RowSource = "distil"
    """What stage distil makes the row of: distil distils the ancestry; labels trains with the labels alone; hub takes
    timm's pretrained weights of `model`; file takes `weights`; tail takes the ancestry's last three blocks, norm and
    head behind random ones and trains with the labels alone; random trains nothing."""
    model: str = ""
    """timm's name of a plain ViT of this shape, for source hub."""
    weights: str = runtime_only("")
    """A safetensors file of timm's names, for source file; stages depend on its content."""
    start: RowStart = "random"
    """Weights that stage distil starts the row from: random; or the ancestry's, of evenly spaced blocks and, where the
    row is narrower, evenly spaced channels (weight selection, arXiv 2311.18823). For sources distil and labels."""

    @property
    def trains(self) -> bool:
        """Whether stage distil trains this row."""
        return self.source in ("distil", "labels", "tail")


@dataclass(frozen=True)
class AncestryConfig:
    """The frozen teacher."""

    model: str = "deit_base_patch16_224"
    """timm's name, or `vit` for a plain ViT of the fields below."""
    width: int = 768
    """Embedding width."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    source: Literal["hub", "file", "train"] = "hub"
    """hub takes timm's pretrained weights, file takes `weights`, train trains it on the training split."""
    weights: str = runtime_only("")
    """A safetensors file of timm's names, for source file; stages depend on its content."""
    drop_path: float = 0.1
    """Largest stochastic-depth rate, for source train."""
    train: TrainConfig = TrainConfig(epochs=300.0, batch_size=1024)
    """For source train."""


@dataclass(frozen=True)
class ModelConfig:
    """The pool's shape."""

    patch_size: int = 16
    """Side of a patch, pixels; the ancestry has the same."""
    depth: int = 6
    """Blocks of every row."""
    rows: tuple[RowConfig, ...] = (
        RowConfig(width=192, heads=3, levels="dense"),
        RowConfig(width=768, heads=12, levels="last", drop_path=0.1),
    )
    """Rows from narrow to wide; one row is a pool of one path."""
    stitch_sharing: StitchSharing = "window"
    """Which stitched paths share a stitch layer: those of a window, as the paper has it; or none: a layer for each
    path."""
    final_norm: bool = True
    """Whether stitched paths apply the final norm, as rows alone do; SN-Net's released code for DeiT does not."""
    stages: tuple[int, ...] = ()
    """Not empty: in place of a pool, one auxiliary net, the only row, without class token, in stages of so many layers;
    the layers of a stage share one set of weights, from which models of `depths` are made."""
    depths: tuple[int, ...] = ()
    """Blocks of each of these models, from few to many."""


@dataclass(frozen=True)
class DistilConfig:
    """METHOD: L = alpha CE + (1 - alpha) (L_att + L_blk + L_pred), for each row."""

    alpha: float = 0.1
    """Weight of the labels' cross-entropy."""
    tau: float = 1.0
    """Temperature of the soft cross-entropy."""
    loss_scale: LossScale = "sample"
    """sample sums the soft cross-entropy over classes; paper averages it over them too."""
    target_norm: Literal["layer", "none"] = "layer"
    """layer normalises the ancestry's transformed outputs (no affine); none is the paper's choice."""
    inverse_weight: float = 1.0
    """Weight of the error of V, the map from narrow to wide; 0 learns no V, the paper's choice."""
    ancestry_precision: AncestryPrecision = "engine"
    """Of the ancestry's forwards, which have no backward: as engine.precision, or its own."""
    train: TrainConfig = TrainConfig(epochs=100.0, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    """The loop."""


@dataclass(frozen=True)
class PoolConfig:
    """How the pool is put together."""

    stitch_init: StitchInit = "transformation"
    """Where the stitch layers start from."""
    samples: int = 2000
    """Clean training images for means and least squares."""
    ridge: float = 1e-3
    """Ridge of the least squares, relative to the mean diagonal of the normal matrix."""


@dataclass(frozen=True)
class GradientConfig:
    """What becomes of parameters that not every path of a step has."""

    unused: Literal["skip", "zero"] = "skip"
    """A parameter that no rank used in a step: skip leaves it and its moments alone, as one process and DDP do; zero
    gives it a zero gradient, DeepSpeed's habit, so that AdamW decays it and its moments still move it."""
    average: Literal["all", "users"] = "all"
    """What a gradient's sum is divided by: all draws of the step, or those whose path has the parameter."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Training of all paths."""

    gradients: GradientConfig = GradientConfig()
    """Parameters that not every path of a step has."""
    watch_every: int = runtime_only(0)
    """Optimizer steps between two measurements of all paths while training; 0 for none."""
    watch_images: int = runtime_only(1000)
    """Validation images of such a measurement."""

    paths_per_batch: int = 1
    """Paths that the same images take on a rank, in micro-steps after each other, for one forward of the ancestry;
    divides train.accumulate. Every batch has that many times the images that accumulate would leave it."""
    policy: Policy = "independent"
    """How ranks draw their paths in a step: each alone; all the same; as many different paths as a step has room for;
    or these with equal work for all ranks, so that none waits."""
    meet: Literal["step", "micro_step"] = "step"
    """Where ranks wait for each other, for `balanced`: step for ZeRO-0, ZeRO-1 and DDP, which exchange gradients once
    in an optimizer step; micro_step for ZeRO-2 and ZeRO-3, which do so in every micro-step."""
    row_weight: float = 1.0
    """How often a row alone is drawn, relative to a stitched path."""
    sandwich: bool = False
    """Every step holds each row alone at least once; ranks times micro-steps must leave room for stitched paths."""
    row_lr: tuple[float, ...] = ()
    """Factor of the learning rate for each row, from narrow to wide; stitch layers have 1. Empty for 1 everywhere."""
    only: tuple[str, ...] = ()
    """Keys of the paths to train and measure, as `lgp paths` lists them; empty for all."""
    costs: str = runtime_only("")
    """File of `lgp bench paths` with each path's seconds, for `balanced`; empty for FLOPs. Stages
    depend on its content."""
    weights: str = runtime_only("")
    """A consolidated checkpoint to take in place of training; stages depend on its content."""
    tau: float = 1.0
    """Temperature of the soft cross-entropy to the ancestry."""
    distil: Literal["soft", "hard"] = "soft"
    """What the ancestry teaches: its whole distribution, or the class that it holds for the likeliest, as a label."""
    distil_weight: float = 1.0
    """Weight of the cross-entropy to the ancestry. At 0 the ancestry does not run in this stage."""
    ancestry_precision: AncestryPrecision = "engine"
    """As in distillation."""
    label_weight: float = 1.0
    """Weight of the labels' cross-entropy."""
    feature_weight: float = 0.0
    """Weight of the last-block feature loss: the mean squared error between a path's tokens before the final norm and
    the ancestry's last block, normalised as in distillation. Only paths that end in a row of the ancestry's width have
    it."""
    lead_weight: float = 0.0
    """Above 0, the widest row is the lead path: it takes the first micro-step of each group of paths_per_batch, and the
    other paths of the group learn its outputs in place of the ancestry's: its logits with this weight, its tokens with
    feature_weight."""
    loss_scale: LossScale = "sample"
    """As in distillation."""
    train: TrainConfig = TrainConfig(epochs=50.0)
    """The loop."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy of every path."""

    batch_size: int = 256
    """Images per forward and rank."""
    before: bool = True
    """Also measure the pool as it was before fine-tuning."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a stage while it trains, so that it can go on."""

    every: int = runtime_only(500)
    """Optimizer steps between two checkpoints; 0 for one at a preemption alone."""
    keep: int = runtime_only(2)
    """Newest checkpoints of a stage that are kept, beside the best measured."""
    on_error: Literal["continue", "stop"] = runtime_only("continue")
    """After a checkpoint that could not be written: train on until the next, or stop."""


@dataclass(frozen=True)
class ExportConfig:
    """The standalone model."""

    path: str = ""
    """Key of the path to export; empty for the choice of `descend`."""
    images: int = 64
    """Validation images on which the export must equal the path."""
    formats: tuple[Format, ...] = ("pt2", "onnx", "int8")
    """Beside the weights: pt2 (torch.export), onnx and int8 (onnxruntime's dynamic quantisation of it), which need the
    extra [onnx] and are left out without it."""
    int8_images: int = 2000
    """Validation images on which the accuracy of int8 is compared with the path's."""


@dataclass(frozen=True)
class FaultConfig:
    """What a run answers to faults while it trains."""

    skip_steps: int = runtime_only(0)
    """Optimizer steps on end that may be left out for a loss or gradient that is not finite or a spike; one more stops
    the run."""
    spike: float = runtime_only(0.0)
    """A loss above so many times the median of the last 100 good steps is a spike; 0 for none."""
    rollback: int = runtime_only(0)
    """How often the run may go back to its last checkpoint where it would stop for such steps."""
    timeout_s: float = runtime_only(1800.0)
    """Seconds a rank may stand still in a step until the run is ended; elsewhere ten times as long, an hour at most."""


@dataclass(frozen=True)
class RunConfig:
    """A complete run, from shards to an exported descendant."""

    recipe: str = runtime_only("")
    """Name of the recipe that this began as; the default run directory is called after it."""
    seed: int = 0
    """Seeds initialisation, order, augmentation and paths."""
    data: DataConfig = DataConfig()
    """Shards and input."""
    model: ModelConfig = ModelConfig()
    """Shape of the pool."""
    engine: EngineConfig = EngineConfig()
    """Precision and device."""
    faults: FaultConfig = FaultConfig()
    """What stops a run, and what does not."""
    ancestry: AncestryConfig = AncestryConfig()
    """Stage ancestry."""
    distil: DistilConfig = DistilConfig()
    """Stage distil."""
    pool: PoolConfig = PoolConfig()
    """Stage pool."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Stage finetune."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Stage evaluate."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving while a stage trains."""
    budget: Budget = Budget()
    """Stage descend."""
    export: ExportConfig = ExportConfig()
    """Stage export."""
    run_dir: str = runtime_only("")
    """Where results go; empty for runs/RECIPE."""
    trackers: tuple[str, ...] = runtime_only(("tensorboard",))
    """Trackers of accelerate: tensorboard, wandb, ..."""
    resume: str = runtime_only("auto")
    """auto goes on from a stage's newest whole checkpoint, or begins; latest asks for one; never begins again; a path
    names a checkpoint."""
    allow_change: tuple[str, ...] = runtime_only(())
    """Settings that may differ from those of the checkpoint, by dotted key."""
    force: bool = runtime_only(False)
    """Make the stage's artifact again although one is complete."""
    debug: bool = runtime_only(False)
    """Show tracebacks of errors that have a sentence."""

    @property
    def taps_ancestry(self) -> bool:
        """Whether rows or paths learn from the ancestry's blocks or their outputs, not from its logits alone."""
        rows = any(row.source == "tail" or row.levels != "none" or row.start == "ancestry" for row in self.model.rows)
        return rows or min(self.finetune.feature_weight, self.finetune.distil_weight) > 0

    @property
    def needs_ancestry(self) -> bool:
        """Whether any stage uses the ancestry."""
        sources = {row.source for row in self.model.rows}
        return bool({"distil", "tail"} & sources) or self.taps_ancestry or self.finetune.distil_weight > 0

    @property
    def directory(self) -> str:
        """Where results go."""
        return self.run_dir or f"runs/{self.recipe}"

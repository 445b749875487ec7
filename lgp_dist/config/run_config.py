"""Every setting of a run, as frozen dataclasses. Field docs are the help texts of `lgp` and name the units.

`runtime_only` marks fields that may differ between runs without changing what is computed (threads, logging, the run
directory). Stages depend on all others, which are compared before an artifact is used again.
"""

from dataclasses import dataclass
from typing import Literal

from lgp_dist.config.budget import Amount, Budget
from lgp_dist.config.data_config import AugmentConfig as AugmentConfig
from lgp_dist.config.data_config import DataConfig, runtime_only
from lgp_dist.config.engine_config import AncestryPrecision, CheckpointConfig, EngineConfig, FaultConfig
from lgp_dist.config.engine_config import Ops as Ops
from lgp_dist.config.engine_config import Precision as Precision

Levels = Literal["none", "last", "dense"]
RowSource = Literal["distil", "labels", "hub", "file", "tail", "random"]
StitchInit = Literal["transformation", "transformation_paper", "transformation_pinv", "least_squares", "random"]
Policy = Literal["independent", "shared", "spread", "balanced", "in_turn"]
LossScale = Literal["sample", "paper"]
StitchSharing = Literal["window", "path"]
RowStart = Literal["random", "ancestry"]
Head = Literal["pretrained", "fit", "none"]
Format = Literal["pt2", "onnx", "int8"]


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, optimizer, learning rate and regularisation of the stage's training."""

    epochs: float = 100.0
    """Passes over the training split."""
    max_steps: int = 0
    """Optimizer steps to stop after; 0 for no limit. The learning rate's schedule then spans these."""
    batch_size: int = 128
    """Images per optimizer step, over all ranks and micro-steps."""
    accumulate: int = 1
    """Micro-steps per optimizer step."""
    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 5.0
    """Linear warm-up from min_lr to lr, epochs."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors, tokens and transformations have none."""
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
    """Share of the target that is spread over all classes."""
    log_every: int = runtime_only(20)
    """Optimizer steps between two lines of the log and of metrics.jsonl."""


@dataclass(frozen=True)
class RowConfig:
    """One row of the pool: an auxiliary model, its shape and what it learns from."""

    width: int
    """Embedding width of every block."""
    heads: int
    """Attention heads."""
    levels: Levels = "none"
    """Blocks that are distilled: none; the last; or dense, three levels."""
    drop_path: float = 0.0
    """Stochastic-depth rate of the last block in stage distil; the first has 0."""
    source: RowSource = "distil"
    """Where the row's weights come from. distil: distilled from the ancestry. labels: trained with labels only. hub:
    timm's pretrained weights of `model`. file: `weights`. tail: random blocks, then the ancestry's last three blocks,
    norm and head, trained with labels only. random: untrained."""
    model: str = ""
    """For source hub: timm's name of a plain ViT of this shape."""
    weights: str = runtime_only("")
    """For source file: a safetensors file with timm's tensor names. Stages depend on its content."""
    start: RowStart = "random"
    """Weights that stage distil starts the row from: random; or the ancestry's, of evenly spaced blocks and, where the
    row is narrower, evenly spaced channels (weight selection, arXiv 2311.18823). For sources distil and labels."""
    depth: int = 0
    """Blocks; 0 for model.depth. A multiple of those of the row before."""

    @property
    def trains(self) -> bool:
        """Whether stage distil trains this row."""
        return self.source in ("distil", "labels", "tail")


@dataclass(frozen=True)
class AncestryConfig:
    """The frozen teacher: its model and where its weights come from."""

    model: str = "deit_base_patch16_224"
    """A model of timm, or `vit` for a plain ViT of the width, depth and heads given here."""
    width: int = 768
    """Embedding width."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    source: Literal["hub", "file", "train"] = "hub"
    """hub: timm's pretrained weights. file: `weights`. train: trained here on the training split."""
    weights: str = runtime_only("")
    """For source file: a safetensors file with timm's tensor names. Stages depend on its content."""
    image_size: int = 0
    """Side of the ancestry's input, pixels, to which images are resized; 0 for data.image_size."""
    mean: tuple[float, ...] = ()
    """Mean of the ancestry's input, to which images are renormalised; empty for timm's of this model, or data.mean."""
    std: tuple[float, ...] = ()
    """Standard deviation, likewise."""
    head: Head = "pretrained"
    """The classifier. pretrained: the model's own, of data.num_classes classes. fit: logistic regression on its pooled
    features, fitted to head_images training images. none: it teaches by its blocks alone."""
    head_images: int = 10_000
    """For head fit: training images, without augmentation."""
    drop_path: float = 0.1
    """For source train: stochastic-depth rate of the last block; the first has 0."""
    train: TrainConfig = TrainConfig(epochs=300.0, batch_size=1024)
    """Training, for source train."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the pool: rows, depth, patches and stitch layers."""

    patch_size: int = 16
    """Side of a patch, pixels, of rows and of an ancestry that is no model of timm."""
    depth: int = 6
    """Blocks of every row without a depth of its own."""
    rows: tuple[RowConfig, ...] = (
        RowConfig(width=192, heads=3, levels="dense"),
        RowConfig(width=768, heads=12, levels="last", drop_path=0.1),
    )
    """Rows from narrow to wide; a single row is a pool of one path."""
    stitch_sharing: StitchSharing = "window"
    """Which stitched paths share a stitch layer: those of a window, as in the paper; or none: each has its own."""
    stitch_rank: int = 0
    """Rank of the update that training adds to a stitch layer's fixed initial weight (SN-Net v2); 0 for none."""
    two_way: bool = False
    """Stitch layers in both directions, one for each position and direction, as in SN-Net v2: paths lead from either of
    two rows to the other, and some of them back."""
    final_norm: bool = True
    """Apply the final norm on stitched paths, as on rows alone; SN-Net's released code for DeiT does not."""
    stages: tuple[int, ...] = ()
    """SWS in place of a pool: layers of each stage of the only row, which has no class token. The layers of a stage
    share one set of weights, from which models of `depths` are made. Empty for a pool."""
    depths: tuple[int, ...] = ()
    """For `stages`: blocks of each model, from few to many."""
    widths: tuple[int, ...] = ()
    """Nested widths in place of a pool: the only row is one ViT, and its first channels, heads and hidden units make a
    model of each of these widths. The last is the row's. Empty for a pool."""


@dataclass(frozen=True)
class DistilConfig:
    """Distillation of each row: L = alpha CE + (1 - alpha) (L_att + L_blk + L_pred)."""

    alpha: float = 0.1
    """Weight of the cross-entropy to the labels, from 0 to 1."""
    tau: float = 1.0
    """Temperature of the soft cross-entropy to the ancestry, L_pred."""
    loss_scale: LossScale = "sample"
    """The soft cross-entropy is averaged over the batch and, over classes, summed (sample) or averaged too (paper)."""
    target_norm: Literal["layer", "none"] = "layer"
    """Normalisation of the ancestry's transformed outputs: layer norm without affine; or none, as in the paper."""
    inverse_weight: float = 1.0
    """Weight of the error of V, the map from narrow to wide; 0 learns no V, as in the paper."""
    ancestry_precision: AncestryPrecision = "engine"
    """Precision of the ancestry's forwards, which have no backward; engine for that of engine.precision."""
    train: TrainConfig = TrainConfig(epochs=100.0, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    """Length, batch, optimizer, learning rate and regularisation of the stage's training."""


@dataclass(frozen=True)
class PoolConfig:
    """How stitch layers are initialised."""

    stitch_init: StitchInit = "transformation"
    """Initial stitch layers: the learned transformation, variants of it, least squares on images, or random."""
    samples: int = 2000
    """Training images, without augmentation, for means and least squares."""
    ridge: float = 1e-3
    """Ridge of the least squares, relative to the mean diagonal of the normal matrix."""


@dataclass(frozen=True)
class GradientConfig:
    """Gradients of parameters that some paths of a step lack."""

    unused: Literal["skip", "zero"] = "skip"
    """For a parameter that no rank used in a step: skip leaves it and its moments unchanged, as one process does; zero
    gives it a zero gradient, as DeepSpeed does, so that weight decay and AdamW's moments still move it."""
    average: Literal["all", "users"] = "all"
    """Divide a summed gradient by all draws of the step, or by those whose path has the parameter (users)."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of all paths: how ranks draw them, losses and learning rates."""

    gradients: GradientConfig = GradientConfig()
    """Gradients of parameters that some paths of a step lack."""
    watch_every: int = runtime_only(0)
    """Optimizer steps between two measurements of all paths while training; 0 for none."""
    watch_images: int = runtime_only(1000)
    """Validation images of each of these measurements."""

    paths_per_batch: int = 1
    """Paths that a rank trains on the same images, in consecutive micro-steps with one forward of the ancestry. Divides
    train.accumulate; such a batch has paths_per_batch x batch_size / (ranks x accumulate) images."""
    policy: Policy = "independent"
    """How ranks draw the paths of a step. independent: each rank its own. shared: one for all ranks. spread: as many
    different paths as a step has room for. balanced: as spread, with equal work for all ranks. in_turn: every rank all
    paths, from the widest to the narrowest, for nested widths."""
    meet: Literal["step", "micro_step"] = "step"
    """For policy balanced, when ranks exchange gradients: once per optimizer step (ZeRO-0, ZeRO-1, DDP) or in every
    micro-step (ZeRO-2, ZeRO-3)."""
    row_weight: float = 1.0
    """Probability of drawing a row alone, relative to that of a stitched path."""
    bin_flops: Amount = Amount(0)
    """Width of a bin of FLOPs. Bins are drawn equally often, and so are the paths of a bin, as in SN-Net v2. 0 for no
    bins."""
    sandwich: bool = False
    """Draw each row alone at least once per step; ranks times micro-steps must exceed the number of rows."""
    row_lr: tuple[float, ...] = ()
    """Factor of the learning rate for each row, from narrow to wide; 1 for stitch layers. Empty for 1 everywhere."""
    only: tuple[str, ...] = ()
    """Keys of the paths to train and evaluate, as `lgp paths` lists them; empty for all."""
    costs: str = runtime_only("")
    """For policy balanced: file of `lgp bench paths`, seconds of each path; empty for FLOPs. Stages depend on it."""
    weights: str = runtime_only("")
    """A consolidated checkpoint to take instead of training. Stages depend on its content."""
    start_weights: str = runtime_only("")
    """Weights of this pool (safetensors) to train from instead of stage pool's. Stages depend on its content."""
    tau: float = 1.0
    """Temperature of the soft cross-entropy to the ancestry."""
    distil: Literal["soft", "hard"] = "soft"
    """Target from the ancestry: soft, its distribution; or hard, its most likely class."""
    distil_weight: float = 1.0
    """Weight of the cross-entropy to the ancestry; 0 leaves the ancestry out of this stage."""
    ancestry_precision: AncestryPrecision = "engine"
    """Precision of the ancestry's forwards, as distil.ancestry_precision."""
    label_weight: float = 1.0
    """Weight of the cross-entropy to the labels."""
    feature_weight: float = 0.0
    """Weight of the last-block feature loss: the mean squared error between a path's tokens before the final norm and
    the ancestry's normalised last block. Paths that end in a row of another width than the ancestry's have none."""
    lead_weight: float = 0.0
    """Above 0, the widest row is the lead path: it takes the first micro-step of each group of paths_per_batch, and the
    other paths of the group learn its outputs in place of the ancestry's: its logits with this weight, its tokens with
    feature_weight. Under policy in_turn each path learns from the one before."""
    loss_scale: LossScale = "sample"
    """As distil.loss_scale."""
    train: TrainConfig = TrainConfig(epochs=50.0)
    """Length, batch, optimizer, learning rate and regularisation of the stage's training."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of every path."""

    batch_size: int = 256
    """Images per forward and rank."""
    before: bool = True
    """Also evaluate the pool before fine-tuning."""


@dataclass(frozen=True)
class FormatsConfig:
    """Formats of a standalone model, and how they are checked."""

    images: int = 64
    """Validation images on which each format is compared with the path."""
    formats: tuple[Format, ...] = ("pt2", "onnx", "int8")
    """Formats in addition to safetensors: pt2 (torch.export), onnx, and int8 (onnxruntime's dynamic quantisation). The
    last two need the extra [onnx] and are left out without it."""
    int8_images: int = 2000
    """Validation images on which int8's accuracy is compared with the path's."""


@dataclass(frozen=True)
class ExportConfig(FormatsConfig):
    """The standalone model: which path, which formats, how it is checked."""

    path: str = ""
    """Key of the path to export; empty for the choice of `descend`."""


@dataclass(frozen=True)
class SpecialiseConfig:
    """Paths that `lgp run` trains alone, from the pool's weights, when the pool is done."""

    top: int = runtime_only(0)
    """Budgets of parameters, at equal ratios up to the largest path; the best path of each is trained. 0 for none."""
    paths: tuple[str, ...] = runtime_only(())
    """Keys of paths to train alone too."""
    epochs: float = runtime_only(0.0)
    """Passes over the training split; 0 for a quarter of stage finetune's."""
    lr: float = runtime_only(0.0)
    """Peak learning rate; 0 for a quarter of stage finetune's."""


@dataclass(frozen=True)
class RunConfig:
    """A complete run: its parts, seed, run directory, trackers, and how it resumes."""

    recipe: str = runtime_only("")
    """Name of the recipe, or FILE.py:FUNCTION; names the default run directory."""
    seed: int = 0
    """Seed of initialisation, order of images, augmentation and draws of paths."""
    data: DataConfig = DataConfig()
    """Shards, input and augmentation."""
    model: ModelConfig = ModelConfig()
    """Shape of the pool: rows, depth, patches and stitch layers."""
    engine: EngineConfig = EngineConfig()
    """Precision, device, memory and communication."""
    faults: FaultConfig = FaultConfig()
    """What the run does about bad steps and hanging ranks."""
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
    """When a stage saves while it trains, and how many checkpoints are kept."""
    budget: Budget = Budget()
    """Stage descend."""
    export: ExportConfig = ExportConfig()
    """Stage export."""
    specialise: SpecialiseConfig = SpecialiseConfig()
    """Paths that `lgp run` trains alone when the pool is done."""
    run_dir: str = runtime_only("")
    """Folder for results; empty for runs/RECIPE."""
    trackers: tuple[str, ...] = runtime_only(("tensorboard",))
    """Experiment trackers of accelerate, such as tensorboard and wandb."""
    tracker_args: tuple[str, ...] = runtime_only(())
    """Arguments of trackers, as TRACKER.KEY=VALUE: wandb.entity=team, wandb.project=vits (in place of the recipe)."""
    resume: str = runtime_only("auto")
    """auto: from a stage's newest whole checkpoint, if there is one. latest: from it, and there must be one. never:
    from the start. A path: from this checkpoint."""
    allow_change: tuple[str, ...] = runtime_only(())
    """Dotted keys of settings that may differ from the checkpoint's."""
    force: bool = runtime_only(False)
    """Run the stages again even if their artifacts are complete."""
    check: bool = runtime_only(False)
    """For lgp ancestry: say what the model is, what of it will be used and what must be set, without its weights."""
    debug: bool = runtime_only(False)
    """Show the traceback of an error before its sentence."""

    @property
    def has_levels(self) -> bool:
        """Whether rows are compared with the ancestry's blocks in distillation."""
        return any(row.levels != "none" for row in self.model.rows)

    @property
    def copies_ancestry(self) -> bool:
        """Whether rows take weights of the ancestry."""
        return any(row.source == "tail" or row.start == "ancestry" for row in self.model.rows)

    @property
    def taps_ancestry(self) -> bool:
        """Whether outputs of the ancestry's blocks are used, not its logits alone."""
        return self.has_levels or (self.teaches_paths and self.finetune.feature_weight > 0)

    @property
    def teaches_paths(self) -> bool:
        """Whether the ancestry has something to teach in stage finetune."""
        return self.finetune.distil_weight > 0 and (self.ancestry.head != "none" or self.finetune.feature_weight > 0)

    @property
    def makes_rows_of_ancestry(self) -> bool:
        """Whether stage distil uses the ancestry."""
        return self.copies_ancestry or any(row.source == "distil" for row in self.model.rows)

    @property
    def needs_ancestry(self) -> bool:
        """Whether any stage uses the ancestry."""
        return self.makes_rows_of_ancestry or self.teaches_paths

    @property
    def directory(self) -> str:
        """Folder for results."""
        return self.run_dir or f"runs/{self.recipe.rpartition(':')[2]}"

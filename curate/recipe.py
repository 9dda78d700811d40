"""The recipe: what to curate, with what, and how; every field is checked before anything runs."""

import hashlib
import json
import math
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from curate.criteria import Criterion, Loss, Method
from curate.recipe_types import LocalPath, Paths, Section, expanding

Precision = Literal["fp32", "bf16"]
DeviceType = Literal["cuda", "cpu"]
BadShardPolicy = Literal["fail", "skip"]
NEWER = ["pool.images", "pool.caption_seed", "pool.where", "pool.keep", "output.mode", "learner.scoring_resolution"]


class PoolSection(Section):
    """The raw pairs."""

    path: Paths = Field(
        description="folder, glob, file or fsspec URL of shards, or a list: Parquet, WebDataset tars, Arrow files of "
        "`datasets`, tables that name pictures; `key=value` folders are columns"
    )
    image: str | None = Field(
        None, description="image column, or one of paths or URLs; found by convention (jpg, image, …) if not given"
    )
    images: LocalPath | None = Field(
        None, description="folder or URL that relative paths of pictures are of; the shard's own if not given"
    )
    caption: str | None = Field(
        None,
        description="caption column, of texts or lists of them, or a path into structs or JSON (json.caption); found "
        "by convention (caption, text, …)",
    )
    caption_seed: int = Field(0, ge=0, description="draws one caption of those that a row has; changed, others")
    uid: str | None = Field(None, description="column that identifies a pair; else a hash of image and caption")
    where: str | None = Field(
        None,
        min_length=1,
        description="condition in SQL on your own columns (width >= 200 and similarity > 0.28); other rows are counted "
        "as filtered, their pictures never read; changed, the pool is embedded anew",
    )
    keep: LocalPath | None = Field(
        None,
        description="NumPy file of the uids that are wanted of the pool, as DataComp's subsets (u8,u8), texts or "
        "integers; other rows are counted as filtered",
    )
    on_bad_shard: BadShardPolicy = Field(
        "fail",
        description="a shard that cannot be read stops the round, or is skipped: listed in the manifest if its footer "
        "tells, else all its rows are counted as damaged_shard",
    )
    max_dropped_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of rows that may be unusable before the round stops: a bug looks like bad data",
    )
    max_row_group_bytes: int = Field(
        2**29, ge=2**20, description="largest row group, uncompressed bytes, that a worker loads at once"
    )


class EncoderSection(Section):
    """An open_clip model and its weights."""

    model: Annotated[str, expanding("local-dir:")] = Field(
        description="open_clip model name, local-dir:FOLDER, hf-hub:NAME, or an open_clip JSON config beside the recipe"
    )
    pretrained: LocalPath | None = Field(
        None, description="open_clip pretrained tag or checkpoint file; random weights from the seed if not given"
    )
    trusted: bool = Field(False, description="allow a checkpoint that is not safetensors (it is unpickled)")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="arithmetic of the forward pass; auto is bf16 on CUDA and fp32 on CPUs, or what a model already in "
        "use was begun with",
    )

    def precision_on(self, device_type: DeviceType) -> Precision:
        """The precision that is meant on such a device: tensor cores are made for bf16, many CPUs emulate it."""
        if self.precision == "auto":
            return "bf16" if device_type == "cuda" else "fp32"
        return self.precision

    @property
    def source(self) -> str:
        """Where the model comes from, as messages and `EncoderSpec.source` name it."""
        return self.model if self.pretrained is None else f"{self.model}/{self.pretrained}"


class LearnerSection(EncoderSection):
    """The open_clip model that is trained, and its weights."""

    scoring_resolution: int | None = Field(
        None, ge=1, description="height and width of pictures that rounds score it on (Flexi-JEST); its own if left out"
    )


class EmbedSection(Section):
    """The forward pass."""

    batch_size: int = Field(256, ge=1, description="pairs per forward pass")
    chunk_rows: int = Field(
        1024, ge=1, description="rows decoded ahead while the model runs, and of each row group of an embedding file"
    )
    compile: bool = Field(
        False, description="have torch.compile make the image towers on CUDA: a minute or two that pay for large pools"
    )
    exact_pixels: bool = Field(
        False,
        description="embed and train on the pixels of open_clip's transform to the last bit; without it they are up to "
        "2 levels off (1 - cos of embeddings at most 2e-7, random ViT-B/32) in .4 of its time; changed, the pool is "
        "embedded anew",
    )


class EvaluationSet(Section):
    """Pairs that a learner will be measured on."""

    path: Paths = Field(description="as pool.path")
    image: str | None = Field(None, description="image column; found by convention if not given")
    caption: str | None = Field(
        None, description="caption column, or one of class names as text; found by convention if not given"
    )


class DedupSection(Section):
    """Which pairs of the pool are near-duplicates, and which of them leave before any is chosen."""

    threshold: float = Field(
        0.95,
        ge=0.5,
        le=0.9999,  # above, rounding decides
        allow_inf_nan=False,
        description="cosine of two images, by the reference, from which on they are near-duplicates",
    )
    caption_threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        allow_inf_nan=False,
        description="cosine that their captions must have as well; captions do not matter if not given",
    )
    groups: Literal["components", "greedy"] = Field(
        "components",
        description="drop all but one of the pairs that near-duplicates connect, or only those with a better-ranked "
        "near-duplicate",
    )
    earlier: Literal["stand", "anew"] = Field(
        "stand", description="when the pool grows: decisions on earlier shards stand, or all are decided anew"
    )
    evaluation: list[EvaluationSet] = Field([], description="sets whose images' near-duplicates leave the pool")
    max_dropped_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the usable rows that may leave as near-duplicates, copies not counted, before a round "
        "stops: to a weak reference all pictures look alike",
    )


class SelectionSection(Section):
    """How sub-batches are chosen; the words are those of arXiv 2406.17711."""

    sub_batch_size: int = Field(ge=1, description="b, pairs per sub-batch: the batch that the learner trains on")
    # Defaults are those of docs/acceleration.md, "Where the defaults come from". This one by "Arms on the web-like
    # pool", of which a tenth is wanted: 0.9 needed fewer examples than 0.8 and 0.5.
    filter_ratio: float = Field(0.9, ge=0, lt=1, description="1 - b/B, share of each super-batch that is discarded")
    # By "By batch, filter ratio, staleness and crowding", where 4 and 32 were tried beside it.
    n_chunks: int = Field(16, ge=1, validate_default=True, description="draws per sub-batch")
    loss: Loss = Field("sigmoid", description="the learner's training loss")
    # By "What was chosen by what": the best of the three from random weights, and no learner need be run to choose.
    criterion: Literal[Criterion, "auto"] = Field(
        "easy_reference",
        description="what makes a sub-batch worth training on; auto: easy_reference while the learner is at its start, "
        "or where the reference knows little of the pool, then learnability, uniform once it knows nothing more",
    )
    method: Method = Field("joint", description="how a sub-batch is drawn")
    # By "What was chosen by what": 3 to 100 were alike for easy-reference. By "Settings" of acceleration/heads.md for
    # learnability of a learner past its start; before it a high gain, as the paper's 100, follows the learner's noise.
    gain: float = Field(10.0, gt=0, allow_inf_nan=False, description="factor on the scores: larger is greedier")
    super_batches: int | None = Field(
        None, ge=1, description="super-batches, and so sub-batches, per round; as many as the pool holds if not given"
    )

    window_rows: int | None = Field(
        None,
        ge=1,
        validate_default=True,
        # What shuffled pools need no more of, docs/scale.md, "What windows cost in quality".
        description="candidates of a window, from whose shards alone its super-batches are drawn; as many as a round "
        "takes if not given, or the whole pool if super_batches is not given either",
    )

    @property
    def is_open(self) -> bool:
        """Whether a round decides what to choose by: `auto`, unless batches are uniform anyway."""
        return self.criterion == "auto" and self.method != "uniform"

    @property
    def least_window_rows(self) -> int | None:
        """Candidates of a window at least; None if it is the whole pool."""
        if self.window_rows is None and self.super_batches is not None:
            return self.super_batches * self.super_batch_size
        return self.window_rows

    @property
    def super_batch_size(self) -> int:
        """B, candidates of each sub-batch."""
        return _B(self.sub_batch_size, self.filter_ratio)

    # Of the field and not of the model: pydantic skips a model's validators once any of its fields is wrong.
    @field_validator("n_chunks")
    @classmethod
    def _chunks_fit(cls, n_chunks: int, info: ValidationInfo) -> int:
        sub_batch_size = info.data.get("sub_batch_size", n_chunks)
        if n_chunks > sub_batch_size:
            raise PydanticCustomError(
                "chunks",
                "must not exceed sub_batch_size = {b}: each chunk draws at least one; lower n_chunks",
                {"b": sub_batch_size},
            )
        return n_chunks

    @field_validator("window_rows")
    @classmethod
    def _window_holds_a_super_batch(cls, window_rows: int | None, info: ValidationInfo) -> int | None:
        b, ratio = info.data.get("sub_batch_size"), info.data.get("filter_ratio")
        if window_rows is not None and b is not None and ratio is not None and window_rows < (B := _B(b, ratio)):
            raise PydanticCustomError(
                "window", "must be at least the {B} candidates of a super-batch; raise it or leave it out", {"B": B}
            )
        return window_rows


def _B(sub_batch_size: int, filter_ratio: float) -> int:  # noqa: N802 the paper's letter
    """The smallest integer with 1 - b/B at least filter_ratio, computed without rounding error."""
    return math.ceil(sub_batch_size / (1 - Fraction(str(filter_ratio))))


class OutputSection(Section):
    """The curated files."""

    file_rows: int = Field(8192, ge=1, description="rows per curated file, rounded to whole sub-batches (at least one)")
    mode: Literal["copy", "index"] = Field(
        "copy",
        description="index: rounds hold no pictures, and the reader fetches them from the pool, which must stay as it "
        "is; for tars and pictures by path, as a row group of Parquet is read whole for one of its rows",
    )


class ResourcesSection(Section):
    """What to use of the machine or cluster: decides the speed of a round, and what `precision = "auto"` means."""

    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto",
        description="what computes: the GPUs that are there, if any, else CPUs; GPUs, which are waited for; CPUs",
    )
    wait_s: float = Field(
        600,
        ge=0,
        allow_inf_nan=False,
        description='longest wait for GPUs to join a cluster, seconds, with device = "cuda"',
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="embedding actors; one per GPU, else as many as CPUs and memory allow; with device = "
        '"cuda" so many GPUs are waited for',
    )
    threads: int = Field(1, ge=1, description="decoding threads, and CPU threads of the model, per worker")
    loaders: int | None = Field(
        None,
        ge=0,
        description="decoding processes per worker, instead of threads; beside a GPU its share of the node's cores "
        "less two if not given, else none",
    )
    crop_actors: int = Field(
        0,
        ge=0,
        description="actors per worker that decode instead, a CPU each, spread over the cluster's nodes; for nodes "
        "short of cores, as pixels are five times the bytes of pictures",
    )
    address: str = Field("local", description="Ray cluster: local, auto or ray://host:port")
    price_per_hour: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="of one worker, with its share of its node, in any currency: `curate check` then says what a round "
        "costs",
    )

    @field_validator("crop_actors")
    @classmethod
    def _one_way_to_decode(cls, crop_actors: int, info: ValidationInfo) -> int:
        if crop_actors and info.data.get("loaders"):
            raise PydanticCustomError(
                "crop_actors",
                "must be 0 where loaders = {n} decode; leave out one of the two",
                {"n": info.data["loaders"]},
            )
        return crop_actors


class TrainSection(Section):
    """`curate train`."""

    data: Literal["rounds", "pool"] = Field("rounds", description="committed rounds, or uniform batches of the pool")
    steps: int | None = Field(
        None,
        ge=1,
        validate_default=True,
        description="steps in all, where the cosine ends; without it the rate stays at its peak while rounds come",
    )
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="peak, after the warm-up")
    warmup_steps: int = Field(15, ge=0, description="steps that warm up linearly; 1 % of all is usual")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's")
    beta2: float = Field(0.95, gt=0, lt=1, description="AdamW's; 0.999 spikes at high filter ratios (paper, A.2)")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    # Of ViT-B/16 in bf16 that is 20 GB of activations, or 3 with grad_checkpointing, as `jobs/memory.py` computes them;
    # `curate check` says what yours hold.
    micro_batch: int = Field(
        256,
        ge=1,
        description="pairs of a forward pass on each rank; a larger share of a batch is embedded in parts, twice, with "
        "the loss and the gradient of the whole batch: as many as memory holds are fastest",
    )
    grad_checkpointing: bool = Field(
        False, description="keep fewer activations and compute them again: less memory, a third more time"
    )
    fully_shard: bool = Field(
        False,
        description="shard weights, gradients and moments over the ranks by torch's fully_shard (FSDP2), where a model "
        "does not fit one: 16 bytes a weight are divided, and weights are gathered in each pass",
    )
    compile: bool = Field(False, description="torch.compile the learner: faster steps after minutes of compiling")
    approximate_share: float = Field(
        0.0, ge=0, lt=1, description="share of each batch that is seen at learner.scoring_resolution; the paper has 0.5"
    )
    workers: int = Field(0, ge=0, description="decoding processes per rank, or threads with data = pool")
    follow: Literal["stop", "wait", "repeat"] = Field(
        "stop",
        description="after the newest round: stop, wait for the next one, or train on the newest again meanwhile",
    )
    max_wait_s: float | None = Field(
        None, gt=0, description="longest wait for a round, seconds; for ever if not given; repeats do not count"
    )
    max_repeats: int = Field(1, ge=1, description='most times that a round is trained on again, with follow = "repeat"')
    publish_every: int | None = Field(
        None, ge=1, description="steps between published learners; one at the end of each round if not given"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints; one with each learner, too")
    log_every: int = Field(10, ge=1, description="steps between lines of the log")
    logs: LocalPath | None = Field(
        None,
        description="local folder of log.jsonl and TensorBoard; trainer/ in the root, or here if that is on S3",
    )

    @field_validator("steps")
    @classmethod
    def _pool_needs_steps(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if steps is None and info.data.get("data") == "pool":
            raise PydanticCustomError(
                "steps", 'must be given: with data = "pool" there is no natural end; add it or use --set train.steps=…'
            )
        return steps


class EvaluateSection(Section):
    """A held-out set on which the learner is measured while it trains."""

    path: Paths = Field(description="as pool.path; at most 100,000 pairs, which are held in memory")
    image: str | None = Field(None, description="image column; found by convention if not given")
    caption: str | None = Field(None, description="caption column; found by convention if not given")
    label: str | None = Field(None, description="column of class names, for zero-shot classification")
    templates: list[str] = Field(
        ["a photo of a {}."],
        min_length=1,
        description="prompts for a class, {} being its name; embeddings are averaged",
    )
    every: int = Field(500, ge=1, description="steps between evaluations; also before the first step")
    batch_size: int = Field(256, ge=1, description="pairs per forward pass")

    @field_validator("templates")
    @classmethod
    def _name_the_class(cls, templates: list[str]) -> list[str]:
        if bad := [template for template in templates if template.count("{}") != 1]:
            raise PydanticCustomError("templates", "must each hold {} once; correct {bad}", {"bad": repr(bad[0])})
        return templates


class ScheduleSection(Section):
    """`curate rounds`: when the next round begins."""

    policy: Literal["learner", "ahead", "clock"] = Field(
        "learner",
        description="a round for each new learner; up to `ahead` rounds that the trainer has not finished; or by time",
    )
    ahead: int = Field(2, ge=1, description="with policy = ahead: 2 lets one be made while one is trained on")
    every_s: float = Field(3600, gt=0, description="with policy = clock: seconds from one commit to the next round")
    rounds: int | None = Field(
        None, ge=1, description="rounds in all, whereupon the stream is ended; without it until somebody ends it"
    )
    attempts: int = Field(3, ge=1, description="tries of one round before giving up")
    backoff_s: float = Field(10, ge=0, description="wait before the second try, doubled before each later one")


class Recipe(Section):
    """The whole recipe, resolved: every default filled in."""

    root: LocalPath = Field(description="where everything is written: a local folder or s3://bucket/prefix")
    seed: int = Field(0, ge=0, description="every random draw derives from it")
    pool: PoolSection
    reference: EncoderSection | None = Field(None, description="the fixed model; needed by rounds, not by train")
    learner: LearnerSection
    embed: EmbedSection = EmbedSection()
    dedup: DedupSection | None = Field(None, description="near-duplicates; exact ones alone leave if not given")
    selection: SelectionSection
    output: OutputSection = OutputSection()
    resources: ResourcesSection = ResourcesSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection | None = Field(None, description="held-out set for `curate train`")
    schedule: ScheduleSection = ScheduleSection()

    @field_validator("train")
    @classmethod
    def _smaller_pictures_have_a_size(cls, train: TrainSection, info: ValidationInfo) -> TrainSection:
        learner = info.data.get("learner")
        if train.approximate_share and learner is not None and learner.scoring_resolution is None:
            raise PydanticCustomError(
                "approximate_share", "approximate_share needs learner.scoring_resolution; add it, or leave this out"
            )
        return train

    def of_round(self) -> dict[str, Any]:
        """The fields that decide what a round contains, as stored in its plan and its manifest."""
        fields = self.model_dump(mode="json", exclude={"root", "resources", "train", "evaluate", "schedule"})
        del fields["embed"]["compile"]  # decides the last bits alone, as the device does
        if self.embed.exact_pixels:
            del fields["embed"]["exact_pixels"]  # rounds that were begun before there was a choice
        for name in NEWER:  # rounds that were begun before there were any
            section, _, field = name.partition(".")
            if fields[section][field] == type(getattr(self, section)).model_fields[field].default:
                del fields[section][field]
        del fields["pool"]["max_dropped_share"]  # when a round stops: one that was stopped goes on if it is raised
        if self.dedup is not None:
            del fields["dedup"]["max_dropped_share"]  # likewise
        else:
            del fields["dedup"]  # recipes of rounds that were begun before there was any
        return fields

    def fingerprint(self) -> str:
        """Hash of `of_round`: two recipes with the same fingerprint choose the same rounds."""
        return hashlib.sha256(json.dumps(self.of_round(), sort_keys=True).encode()).hexdigest()

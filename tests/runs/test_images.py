"""Pairs with images: batches as under `rl: dpo`, losses as released, whole runs."""

import json
import re
import shutil
from base64 import b64decode, b64encode
from functools import partial
from io import BytesIO

import pytest
import torch
import torch.nn.functional as F
from axolotl.cli.merge_lora import do_cli
from helpers import oracle, ranks, tiny, vision
from helpers.commands import forked
from helpers.engines import engine, series
from helpers.releases import needs_images
from helpers.report_pages import numbers, page_of
from helpers.tiers import first, rest
from helpers.tiny import CACHED, LORA, NF4
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from axolotl_edpo.data.columns import IDS
from axolotl_edpo.data.images import has_images
from axolotl_edpo.data.pair_id import pair_digest
from axolotl_edpo.report.trace import by_pair, read_trace

pytestmark = needs_images

EPSILON = 0.05
PNG = "data:image/png;base64,"
# The language model alone, as the recipes of axolotl name it.
LANGUAGE = {
    **LORA,
    "lora_target_linear": None,
    "lora_target_modules": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a model -> its family."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: vision.save_model(folder / kind, kind) for kind in vision.FAMILIES}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of no, one and two images."""
    return vision.save_pairs(tmp_path_factory.mktemp("pairs"), 18, [1, 2, 0])


@pytest.fixture
def vision_recipe(models, pairs, tmp_path):
    def make(kind="llava", file=pairs, **keys):
        entry = {"path": str(file), "type": "chat_template.default"}
        keys = {"datasets": [entry], "adam_epsilon": 1e-4, **keys}
        return tiny.recipe(tmp_path, models[kind], file, **keys)

    return make


def raw_batch(trainer, rows: list[int]) -> dict:
    """The batch that axolotl's collator makes of some pairs, under any `rl`."""
    from axolotl.utils.collators.mm_rl import AxolotlVisionPreferenceCollator

    collator = trainer.batcher.collators["train"]
    theirs = AxolotlVisionPreferenceCollator(
        processor=collator.processor,
        max_length=collator.max_length,
        normalizer=collator.normalizer,
    )
    names = ("prompt", "chosen", "rejected", "images")
    data = [trainer.train_dataset[row] for row in rows]
    return dict(theirs([{name: row[name] for name in names} for row in data]))


@pytest.mark.parametrize("kind", first([*vision.FAMILIES]))
def test_tokens_and_masks_are_those_of_dpo(vision_recipe, tmp_path, kind):
    ours = tiny.build(tmp_path, vision_recipe(kind))
    keys = vision_recipe(kind, **tiny.DPO, dataset_prepared_path=str(tmp_path / "dpo"))
    trls = tiny.build(tmp_path, keys)
    rows = [ours.train_dataset[i] for i in range(6)]
    assert {len(row["images"]) for row in rows} == {0, 1, 2}
    batch = ours.batcher.collators["train"](rows)
    expected = trls.data_collator([trls.train_dataset[i] for i in range(6)])

    inputs = {**batch, **batch["images"]}
    assert {*expected} - {*inputs} == {"completion_mask"}
    for name in {*expected} - {"completion_mask"}:
        torch.testing.assert_close(inputs[name], expected[name], rtol=0, atol=0)
    scored = expected["completion_mask"][:, 1:].bool()
    assert batch["targets"].tolist() == expected["input_ids"][:, 1:][scored].tolist()
    assert batch["lengths"].tolist() == scored.sum(1).tolist()
    image = ours.batcher.collators["train"].processor.image_token_id
    assert image not in batch["targets"] and image in batch["input_ids"]
    for side, answer in enumerate(IDS[1:]):  # the columns that the checks saw
        for i, row in enumerate(rows):
            kept = expected["attention_mask"][6 * side + i].bool()
            whole = expected["input_ids"][6 * side + i][kept].tolist()
            assert row[IDS[0]] + row[answer] == whole


@pytest.mark.parametrize("kind", first([*vision.FAMILIES]))
def test_losses_and_gradients_are_those_of_the_released_formula(
    vision_recipe, tmp_path, kind
):
    """From the model's own full logits, in float32; the policy is not the reference."""
    trainer = tiny.build(tmp_path, vision_recipe(kind, edpo_epsilon=EPSILON))
    policy = trainer.model
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn_like(weight)
    rows = [0, 1, 2, 3, 4, 5]
    batch = raw_batch(trainer, rows)
    mask = batch.pop("completion_mask")[:, 1:]
    y = batch["input_ids"][:, 1:]
    policy.train()
    a = policy(**batch).logits[:, :-1]
    with torch.no_grad():
        b = trainer.ref_model(**batch).logits[:, :-1]
        plus, minus = oracle.released_differences(a, b, y, mask, EPSILON)
    s = ((plus > 0) & (minus < 0)).long() - ((plus < 0) & (minus > 0)).long()
    assert {*s.tolist()} > {0} or {*s.tolist()} == {-1, 1}
    logps = [x.log_softmax(-1).gather(-1, y[..., None])[..., 0] * mask for x in (a, b)]
    chosen, rejected = (logps[0].sum(1) - logps[1].sum(1)).chunk(2)
    losses = -F.logsigmoid(0.1 / (1 + EPSILON * s) * (chosen - rejected))
    losses.mean().backward()
    expected = {
        name: weight.grad
        for name, weight in policy.named_parameters()
        if weight.requires_grad
    }
    expected = {name: g.clone() for name, g in expected.items() if g is not None}
    policy.zero_grad()

    trainer.prepare(policy)
    trainer.records.begin(1, removes=False)  # the policy has learned
    laid_out = trainer.batcher.collators["train"](
        [trainer.train_dataset[row] for row in rows]
    )
    counts = trainer.batcher.count([laid_out])[:2]
    loss = trainer.compute_loss(policy, laid_out, num_items_in_batch=counts)
    loss.backward()
    assert loss.item() == pytest.approx(losses.mean().item(), abs=1e-5)
    assert any("vision" in name for name in expected)
    largest = max(g.abs().max().item() for g in expected.values())
    for name, weight in policy.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                weight.grad, expected[name], rtol=1e-5, atol=1e-5 * largest, msg=name
            )


@pytest.mark.parametrize("name", first(["ddp", "zero3", "fsdp2"]))
def test_two_ranks_train_as_one_process(vision_recipe, tmp_path, name):
    """17 pairs: the last step has a micro-batch without pairs; one has no images."""
    file = vision.save_pairs(tmp_path / "data", 17, [1, 0, 0, 0, 2])
    runs = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        keys = engine(folder, name) if count == 2 else {}
        if "fsdp_config" in keys:
            layers = "LlamaDecoderLayer,SiglipEncoderLayer"
            keys["fsdp_config"]["transformer_layer_cls_to_wrap"] = layers
        keys |= dict(micro_batch_size=2, gradient_accumulation_steps=4 // count)
        keys |= dict(num_epochs=2, ddp_timeout=120, output_dir=str(folder / "out"))
        runs.append(ranks.run(folder, vision_recipe(file=file, **keys), count, None))
    (alone,), pair = runs
    assert series(pair[0], "kl/beta") == series(pair[1], "kl/beta")
    assert len(series(alone, "loss")) == 5 and alone["beta"] != 0.1
    assert series(pair[0], "num_tokens") == series(alone, "num_tokens")
    for metric, close in (("kl/beta", 1e-6), ("loss", 1e-5), ("grad_norm", 1e-3)):
        expected = series(alone, metric)
        assert series(pair[0], metric) == pytest.approx(expected, rel=1e-4, abs=close)


def test_a_lora_run_learns_and_its_merged_model_is_it(vision_recipe, tmp_path, models):
    """20 steps; the vision tower is frozen, as no layer of it is named."""
    keys = vision_recipe(**LANGUAGE, max_steps=20, learning_rate=1e-2, num_epochs=9)
    trainer = tiny.train(tmp_path, keys)
    logs = tiny.logs(trainer)
    assert len(logs) == 20 and logs[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert logs[0]["kl/p_epsilon_steps"] == logs[0]["kl/n_epsilon_steps"] == 0
    assert logs[-1]["rewards/margins"] > 1 and logs[-1]["rewards/accuracies"] == 1
    trained = {n for n, w in trainer.model.named_parameters() if w.requires_grad}
    assert trained and not any("vision" in name for name in trained)

    batch = raw_batch(trainer, [0, 1, 2, 3])
    batch.pop("completion_mask")
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
    out = tmp_path / "out"
    merge = partial(do_cli, lora_model_dir=str(out))
    with pytest.raises(ValueError, match="layers that have other names.*: legacy`"):
        merge(config=str(tiny.write(tmp_path, keys)))
    merge(config=str(tiny.write(tmp_path, {**keys, "merge_method": "legacy"})))
    merged = AutoModelForImageTextToText.from_pretrained(out / "merged")
    base = AutoModelForImageTextToText.from_pretrained(models["llava"])
    with torch.no_grad():
        before = base(**batch).logits
        adapter = PeftModel.from_pretrained(base, out)(**batch).logits
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(adapter, expected, rtol=0, atol=2e-5)
    assert (before - expected).abs().max() > 0.1


@pytest.mark.parametrize("keys", first([{}, LORA]), ids=["full", "lora"])
def test_a_cached_reference_is_the_live_one(vision_recipe, tmp_path, keys):
    live = tiny.logs(tiny.train(tmp_path, vision_recipe(**keys)))
    cached = tiny.train(tmp_path, vision_recipe(**keys, **CACHED))
    assert cached.ref_model is None
    for a, b in zip(live, tiny.logs(cached), strict=True):
        for name in ("loss", "kl/beta", "rewards/margins"):
            assert a[name] == pytest.approx(b[name], abs=1e-6), name
    # the same text with other pixels is another pair
    rows = [dict(cached.train_dataset[0]) for _ in range(2)]
    rows[1]["edpo_images"] = "0" * 32
    assert pair_digest(rows[0]) != pair_digest(rows[1])


@rest
def test_the_vision_tower_trains_in_qlora(vision_recipe, tmp_path):
    # in float32: axolotl leaves the patch embedding in it, which a CPU does not take
    # through layer norms in bf16
    trainer = tiny.train(tmp_path, vision_recipe(**{**NF4, "bf16": False}))
    trained = {n for n, w in trainer.model.named_parameters() if w.requires_grad}
    assert any("vision_tower" in n for n in trained)
    logs = tiny.logs(trainer)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert logs[0]["kl/p_epsilon_steps"] == logs[0]["kl/n_epsilon_steps"] == 0


@rest
def test_the_commands_take_the_recipe(vision_recipe, tmp_path):
    """Preprocess, train, inspect and evaluate."""
    tiny.write(tmp_path, vision_recipe(**LANGUAGE, val_set_size=0.25))
    for command in ("preprocess", "train", "edpo-inspect"):
        python = ("--launcher", "python") * (command == "train")
        done = forked(tmp_path, command, "recipe.yml", *python)
        assert done.returncode == 0, done.stdout[-3000:]
    assert "13" in done.stdout
    out = str(tmp_path / "out")
    words = ("evaluate", "recipe.yml", "--launcher", "python", "--lora-model-dir", out)
    done = forked(tmp_path, *words)
    assert done.returncode == 0 and "eval_loss" in done.stdout, done.stdout[-3000:]


def test_the_report_shows_every_image(vision_recipe, tmp_path):
    keys = dict(edpo_log_pairs=1, save_strategy="epoch")
    tiny.train(tmp_path, vision_recipe(**LANGUAGE, **keys))
    table = by_pair(read_trace(tmp_path / "out", 99))
    page = page_of(tmp_path / "report", tmp_path / "out")
    shown = [v.removeprefix(PNG) for k, v in page.attributes if k == "src"]
    images = [image for images in table["images"] for image in images]
    assert sorted(shown) == sorted(b64encode(image).decode() for image in images)
    assert {len(images) for images in table["images"]} == {0, 1, 2}
    for file in map(b64decode, shown):
        assert max(Image.open(BytesIO(file)).size) <= 128
    numbers(tmp_path, tmp_path / "out")


# --- what is refused -----------------------------------------------------------------


def refusal(tmp_path, keys: dict) -> str:
    """The message with which a recipe's data are refused, before a model is loaded."""
    with pytest.raises(ValueError) as raised:
        tiny.load_data(tiny.load_config(tmp_path, keys))
    return str(raised.value)


def changed(tmp_path, pairs, change) -> str:
    """A file of one pair, changed."""
    row = json.loads(pairs.read_text().splitlines()[0])
    change(row)
    file = tmp_path / "changed.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return file


def image_in_answer(row):
    row["chosen"]["content"] = [{"type": "image"}, {"type": "text", "text": "so"}]


def video(row):
    row["messages"][0]["content"] = [{"type": "video"}]


def no_file(row):
    row["images"] = ["no-such.png"]


def too_few(row):
    part = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "so"}]
    row["messages"][0]["content"] = part


def with_tools(row):
    row["tools"] = [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (image_in_answer, "of the assistant has a part of `type: image`.*before the a"),
        (video, "has a part of `type: video`: text and image can be trained there"),
        (no_file, "its images and its text do not fit: .*no-such.png"),
        (too_few, r"do not fit: .*images provided \(1\).*placeholders \(2\)"),
        (with_tools, "it has `tools`, which axolotl leaves out of pairs with images"),
    ],
)
def test_a_pair_that_would_lose_something_is_refused(
    vision_recipe, tmp_path, pairs, change, reason
):
    file = changed(tmp_path, pairs, change)
    said = refusal(tmp_path, vision_recipe(file=file))
    assert said.startswith("`datasets`: row 1 of") and re.search(reason, said), said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"sample_packing": True},
            "`sample_packing: true`.*: remove it: the processor",
        ),
        ({"dpo_padding_free": True}, "`dpo_padding_free: true`.*: remove it"),
        ({"eval_sample_packing": True}, "`eval_sample_packing: true`.*: remove it"),
        (
            {"sample_packing": "auto", "edpo_prefix_sharing": True},
            "`edpo_prefix_sharing: true`.*: remove it",
        ),
    ],
)
def test_packing_is_refused(vision_recipe, tmp_path, keys, said):
    assert re.match(said, refusal(tmp_path, vision_recipe(**keys)))


def test_auto_packing_pads_with_a_warning(vision_recipe, tmp_path, caplog):
    made = tiny.build(tmp_path, vision_recipe(sample_packing="auto"))
    assert "`sample_packing: auto`: batches are padded" in caplog.text
    train, evaluation = made.batcher.collators.values()
    # a tokenizer cannot pad in two threads
    assert train.processor.tokenizer is not evaluation.processor.tokenizer


@pytest.mark.parametrize("with_images", ["datasets", "test_datasets"])
def test_sets_of_two_kinds_are_refused(vision_recipe, tmp_path, with_images):
    text = tiny.dataset(tiny.save_pairs(tmp_path / "text.jsonl", 4))
    keys = vision_recipe(test_datasets=text, eval_steps=1)
    if with_images == "test_datasets":
        keys |= {"datasets": text, "test_datasets": keys["datasets"]}
    said = refusal(tmp_path, keys)
    assert re.search("has no column `images`, and the other set has one: add it", said)


def test_a_text_model_is_refused(vision_recipe, tmp_path, parts):
    said = refusal(tmp_path, vision_recipe(base_model=str(parts["model"])))
    assert "there is a column of images, which takes a vision-language model" in said


def test_images_in_messages_need_a_column(recipe, tmp_path, pairs):
    def inline(row):
        del row["images"]
        row["messages"][0]["content"] = [
            {"type": "image"},
            {"type": "text", "text": "a"},
        ]

    entry = {"path": str(changed(tmp_path, pairs, inline)), "type": "chat_template"}
    said = refusal(tmp_path, recipe(datasets=[entry]))
    assert "images are due in a column `images`" in said


def test_long_pairs_are_dropped_and_their_number_said(vision_recipe, tmp_path, caplog):
    keys = vision_recipe(sequence_len=110)
    kept = tiny.load_data(tiny.load_config(tmp_path, keys)).train_dataset
    lengths = [len(r[IDS[0]]) + max(len(r[a]) for a in IDS[1:]) for r in kept]
    assert 0 < len(kept) < 18 and max(lengths) <= 110 and has_images(kept)
    assert f"{18 - len(kept)} of 18 pairs with images are dropped" in caplog.text


def test_an_image_that_changed_since_is_refused(vision_recipe, tmp_path):
    file = vision.save_pairs(tmp_path / "data", 8, [1])
    keys = vision_recipe(file=file)
    trainer = tiny.build(tmp_path, keys)
    row = trainer.train_dataset[0]
    Image.new("RGB", (24, 24), "red").save(row["images"][0])
    with pytest.raises(ValueError, match=r"an image of a pair.*changed since.*\.png"):
        trainer.batcher.collators["train"]([row])


def test_another_processor_prepares_anew(vision_recipe, tmp_path, models, caplog):
    model = shutil.copytree(models["llava"], tmp_path / "model")
    keys = vision_recipe(base_model=str(model))
    tiny.load_data(tiny.load_config(tmp_path, keys))
    file = model / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    file.write_text(json.dumps(settings))
    tiny.load_data(tiny.load_config(tmp_path, keys))
    assert "prepared anew, as the processor changed" in caplog.text

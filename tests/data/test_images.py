"""lit_sparse.ImageData, media and labels on small image files."""

import csv
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from backbones import save_tiny_bert, save_tiny_vit
from datasets import ClassLabel, Dataset, Features, Image, Value
from lightning.pytorch import LightningModule, Trainer
from media_files import write_stripes
from transformers import AutoImageProcessor

from lit_sparse import ImageData, UsageError
from lit_sparse.data.images import ImageMedium


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def folder(tmp_path):
    """Six training and four validation images of stripes."""
    write_stripes(tmp_path / "images" / "train", 6)
    write_stripes(tmp_path / "images" / "validation", 4, seed=1)
    return tmp_path / "images"


@pytest.fixture
def set_up(processor):
    def make(path, stage="fit", **arguments):
        data = ImageData(str(path), **{"processor": processor, **arguments})
        data.setup(stage)
        return data

    return make


def files_in(folder):
    return sorted(folder.rglob("*.png"))


def pixels_of(file, processor):
    """What the processor itself makes of a file, with images made RGB."""
    with PIL.Image.open(file) as image:
        made = AutoImageProcessor.from_pretrained(processor)(images=image.convert("RGB"), return_tensors="pt")
    return made["pixel_values"][0]


def same_pixels(batch, files, processor):
    return torch.equal(batch["pixel_values"], torch.stack([pixels_of(file, processor) for file in files]))


def image_file(file, mode="RGB", seed=0, size=(16, 16), **options):
    """An image of chance, with few colours so that every mode can hold it."""
    pixels = np.random.default_rng(seed).choice([0, 255], (*size, 3)).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).convert(mode).save(file, **options)
    return file


def two_classes(folder, **options):
    """One image of each class as training split, and the folder."""
    for number, name in enumerate(("cat", "dog")):
        image_file(folder / "train" / name / "0.png", seed=number, **options)
    return folder


# What is in a batch.


def test_batches_hold_what_the_processor_makes_of_each_file(folder, set_up, processor):
    data = set_up(folder, batch_size=4, eval_batch_size=3)
    assert (data.num_labels, data.label_names, data.validation_names) == (2, ["horizontal", "vertical"], ("",))
    first, second = data.val_dataloader()
    files = files_in(folder / "validation")
    assert same_pixels(first, files[:3], processor)
    assert same_pixels(second, files[3:], processor)
    assert sorted(first) == ["labels", "pixel_values"]
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([0, 0, 1], [1])
    assert first["labels"].dtype == torch.long
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [4, 2]
    found = {tuple(pixels.flatten().tolist()): int(y) for b in batches for pixels, y in zip(*b.values(), strict=True)}
    expected = {
        tuple(pixels_of(file, processor).flatten().tolist()): int(file.parent.name == "vertical")
        for file in files_in(folder / "train")
    }
    assert found == expected


def test_pixels_are_those_of_the_formula(tmp_path, set_up):
    """For images of the model's own size nothing is resized: (value / 255 - 0.5) / 0.5, colours first."""
    folder = two_classes(tmp_path / "images")
    file = image_file(folder / "validation" / "dog" / "1.png", seed=5)
    (batch,) = set_up(folder).val_dataloader()
    pixels = np.asarray(PIL.Image.open(file)).astype(float)
    expected = torch.tensor((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1)
    torch.testing.assert_close(batch["pixel_values"][0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_any_mode_become_rgb(mode, tmp_path, set_up, processor):
    folder = two_classes(tmp_path / "images")
    file = image_file(folder / "validation" / "cat" / ("1.tif" if mode == "CMYK" else "1.png"), mode)
    with PIL.Image.open(file) as image:
        assert image.mode == mode
    (batch,) = set_up(folder).val_dataloader()
    assert same_pixels(batch, [file], processor)


def test_a_processor_may_want_images_as_they_are(tmp_path, set_up):
    grey = save_tiny_vit(tmp_path / "grey", do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    folder = two_classes(tmp_path / "images", mode="L")
    image_file(folder / "validation" / "cat" / "1.png", "L")
    (batch,) = set_up(folder, processor=grey).val_dataloader()
    assert batch["pixel_values"].shape == (1, 1, 16, 16)


def test_a_photograph_is_turned_as_its_camera_noted(tmp_path, set_up, processor):
    folder = two_classes(tmp_path / "images")
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6  # the camera was held upright: turn clockwise
    turned = image_file(folder / "validation" / "cat" / "1.png", size=(16, 24), exif=exif)
    upright = tmp_path / "upright.png"
    PIL.Image.fromarray(np.rot90(np.asarray(PIL.Image.open(turned)), -1)).save(upright)
    (batch,) = set_up(folder).val_dataloader()
    assert same_pixels(batch, [upright], processor)


def test_workers_make_the_same_batches(folder, set_up):
    alone, by_workers = (list(set_up(folder, num_workers=n, batch_size=3).train_dataloader()) for n in (0, 1))
    assert len(alone) == len(by_workers) == 2
    for one, other in zip(alone, by_workers, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])


# Labels.


def hub_rows(files, values, feature):
    """Rows as the hub keeps them: the bytes of the images in a table."""
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    return Dataset.from_dict({"image": images, "label": values}, Features({"image": Image(), "label": feature}))


def test_a_table_of_the_hubs_form_names_its_classes_even_if_splits_number_them_differently(folder, tmp_path, set_up):
    files = files_in(folder)[:4]
    train = hub_rows(files, [0, 1, 0, 1], ClassLabel(names=["worse", "better"]))
    validation = hub_rows(files, [0, 1, 1, 1], ClassLabel(names=["better", "worse"]))
    train.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    validation.to_parquet(tmp_path / "hub" / "validation-00000-of-00001.parquet")
    data = set_up(tmp_path / "hub")
    assert data.label_names == ["worse", "better"]
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [1, 0, 0, 0]


def test_images_in_a_table_are_those_of_the_files(folder, tmp_path, set_up, processor):
    files = files_in(folder)
    rows = hub_rows(files, [5, 3] * 5, Value("int64"))
    rows.rename_columns({"image": "photo", "label": "stars"}).to_parquet(tmp_path / "data" / "train-00000-of-1.parquet")
    (tmp_path / "hub").mkdir()
    (tmp_path / "data").rename(tmp_path / "hub" / "data")  # only `datasets` finds splits at this depth
    data = set_up(tmp_path / "hub", validation_fraction=0.2, image="photo", label="stars", eval_batch_size=10)
    assert data.label_names == ["3", "5"]
    batches = [next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert [len(batch["labels"]) for batch in batches] == [8, 2]
    found = {
        tuple(pixels.flatten().tolist()): int(label)
        for batch in batches
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    }
    assert found == {tuple(pixels_of(f, processor).flatten().tolist()): 1 - i % 2 for i, f in enumerate(files)}


def test_a_table_may_hold_paths_and_names(folder, tmp_path, set_up, processor):
    (folder / "train").rename(tmp_path / "photos")  # beside the tables, which say what they are
    files = files_in(tmp_path / "photos")
    for split in ("train", "validation"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as stream:
            lines = [[str(file.relative_to(tmp_path)), file.parent.name] for file in files]  # from the working folder
            csv.writer(stream).writerows([["image", "label"], *lines])
    listed = ImageData(data_files={"validation": "validation.csv", "train": "train.csv"}, processor=processor)
    listed.setup("fit")
    for data in (set_up(tmp_path), listed):
        (batch,) = data.val_dataloader()
        assert same_pixels(batch, files, processor)
        assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]


def test_labels_may_be_given_in_another_order(folder, set_up):
    (batch,) = set_up(folder, labels=["vertical", "diagonal", "horizontal"]).val_dataloader()
    assert batch["labels"].tolist() == [2, 2, 0, 0]


def test_a_test_split_with_hidden_labels_gives_batches_without(folder, tmp_path, set_up):
    files, feature = files_in(folder)[:2], ClassLabel(names=["a", "b"])
    hub_rows(files, [0, 1], feature).to_parquet(tmp_path / "hub" / "train.parquet")
    hub_rows(files, [-1, -1], feature).to_parquet(tmp_path / "hub" / "test.parquet")
    (batch,) = set_up(tmp_path / "hub", "test").test_dataloader()
    assert sorted(batch) == ["pixel_values"]


# Splits.


@pytest.mark.parametrize("split", ["predict", "test"])
def test_prediction_needs_no_classes_and_gives_no_labels(split, folder, set_up, processor):
    files = [image_file(folder / split / f"{number}.png", seed=number) for number in range(3)]
    (batch,) = set_up(folder, "predict").predict_dataloader()
    assert sorted(batch) == ["pixel_values"]
    assert same_pixels(batch, files, processor)


@pytest.mark.parametrize("name", ["val", "valid", "dev"])
def test_the_validation_folder_has_several_usual_names(name, folder, set_up, processor):
    (folder / "validation").rename(folder / name)
    (batch,) = set_up(folder).val_dataloader()
    assert same_pixels(batch, files_in(folder / name), processor)


def test_of_classes_alone_the_same_images_are_held_out_in_every_run(tmp_path, set_up):
    write_stripes(tmp_path / "images", 20)

    def splits(seed):
        data = set_up(tmp_path / "images", validation_fraction=0.25, batch_size=20, seed=seed)
        assert data.label_names == ["horizontal", "vertical"]
        return [
            [(float(pixels.sum()), int(label)) for batch in loader for pixels, label in zip(*batch.values())]  # noqa: B905
            for loader in (data.train_dataloader(), data.val_dataloader())
        ]

    train, validation = splits(seed=0)
    assert (len(train), len(validation)) == (15, 5)
    assert len(set(train + validation)) == 20
    other_train, other_validation = splits(seed=1)
    assert other_validation == validation
    assert sorted(other_train) == sorted(train)
    assert other_train != train
    assert splits(seed=0) == [train, validation]


def test_only_image_files_are_read_and_what_is_left_out_is_said(folder, set_up):
    (folder / "train" / "vertical" / ".hidden.png").write_text("of an editor")
    (folder / ".cache").mkdir()
    set_up(folder)
    (folder / "train" / "vertical" / "7.heic").write_text("an image of another kind")
    with pytest.warns(UserWarning, match=r"train that end in \.heic are left out; image files end in \.png, \.jpg"):
        set_up(folder)


def test_a_folder_with_a_table_of_metadata_is_read_by_datasets(tmp_path, set_up, processor):
    rows = []
    for number in range(4):
        image_file(tmp_path / "images" / "train" / f"{number}.png", seed=number)
        rows.append([f"{number}.png", ["red", "blue"][number % 2]])
    with (tmp_path / "images" / "train" / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", "colour"], *rows])
    data = set_up(tmp_path / "images", validation_fraction=0.5, label="colour", eval_batch_size=4)
    assert data.label_names == ["blue", "red"]
    found = {
        float(pixels.sum()): int(label)
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    }
    files = files_in(tmp_path / "images")
    assert found == {float(pixels_of(file, processor).sum()): 1 - i % 2 for i, file in enumerate(files)}


# Checked once.


def test_files_are_looked_at_again_only_if_they_changed(folder, set_up, monkeypatch):
    looked = []
    check = ImageMedium.check
    monkeypatch.setattr(ImageMedium, "check", lambda self, stream: looked.append(stream.name) or check(self, stream))
    set_up(folder)
    assert sorted(looked) == [str(file) for file in files_in(folder)]
    set_up(folder, batch_size=2, seed=4)
    assert len(looked) == 10
    (changed,) = (folder / "validation").glob("vertical/1.png")
    changed.write_bytes(b"no image any more")
    with pytest.raises(UsageError, match=r"validation/vertical/1\.png\) cannot be read"):
        set_up(folder)


# With a Trainer.


class Recorder(LightningModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, float(batch["pixel_values"].sum())))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


def test_a_trainer_gets_the_backbones_processor_and_a_new_order_each_epoch(folder, processor):
    def fit():
        module = Recorder(processor)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=ImageData(str(folder), batch_size=1))
        return [[pixels for epoch, pixels in module.seen if epoch == wanted] for wanted in (0, 1)]

    first, second = fit()
    assert sorted(first) == sorted(float(pixels_of(file, processor).sum()) for file in files_in(folder / "train"))
    assert sorted(second) == sorted(first)
    assert second != first
    torch.manual_seed(1234)
    assert fit() == [first, second]


# Errors.


def assert_refused(match, set_up, path, stage="fit", **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        set_up(path, stage, **arguments)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_named_before_training(folder, set_up):
    (folder / "train" / "horizontal" / "2.png").write_text("<html>not found</html>")
    match = r"Row 1 \(counted from 0\) of the split 'train' \(.*horizontal/2\.png\) cannot be read as image \(cannot"
    assert_refused(match, set_up, folder)


def test_a_file_that_breaks_off_is_named_when_it_is_due(folder, set_up):
    file = folder / "validation" / "vertical" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    loader = set_up(folder).val_dataloader()
    with pytest.raises(UsageError, match=r"Row 3 .* 'validation' \(.*vertical/3\.png\) cannot be read as image"):
        list(loader)


def test_a_path_in_a_table_that_leads_nowhere_is_named(tmp_path, set_up):
    (tmp_path / "train.csv").write_text("image,label\nnowhere.png,a\nnowhere.png,b\n")
    match = r"Row 0 .* 'train' \(nowhere\.png\) cannot be read as image \(.*No such file"
    assert_refused(match, set_up, tmp_path / "train.csv", validation_fraction=0.5)
    (tmp_path / "train.csv").write_text("image,label\n,a\nnowhere.png,b\n")
    assert_refused("Row 0 .* 'train' has no image", set_up, tmp_path / "train.csv", validation_fraction=0.5)


def test_sixteen_bits_are_not_cut_to_eight(folder, set_up):
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 255
    PIL.Image.fromarray(deep).save(folder / "train" / "horizontal" / "deep.png")
    assert_refused(r"deep\.png\) cannot be read as image \(its mode is I;16, but at most 8 bits", set_up, folder)


def test_a_class_without_training_images_names_the_file(folder, set_up):
    image_file(folder / "validation" / "diagonal" / "0.png")
    match = r"validation/diagonal/0\.png\) has the label 'diagonal' .* none of the labels \['horizontal', 'vertical'\]"
    assert_refused(match, set_up, folder)


def test_classes_cannot_be_learned_without_training_images(folder, set_up):
    (folder / "train").rename(folder / "test")
    (folder / "validation").rename(folder / "spare")
    assert_refused("has no training split to learn the labels from: give their names", set_up, folder, "test")
    data = set_up(folder, "test", labels=["vertical", "horizontal"])
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [1, 1, 1, 0, 0, 0]


def test_one_class_is_not_enough(tmp_path, set_up):
    file = image_file(tmp_path / "images" / "train" / "cat" / "0.png")
    assert_refused(r"two different labels, .* \['cat'\]", set_up, file.parents[2], validation_fraction=0.5)


def test_an_empty_split_is_named(folder, set_up):
    for file in files_in(folder / "validation"):
        file.unlink()
    assert_refused(r"'validation' is empty: .*validation has no files ending in \.png", set_up, folder)


def test_a_split_in_two_folders_is_ambiguous(folder, set_up):
    write_stripes(folder / "val", 2)
    assert_refused("'validation' must be one folder, but .* has validation and val", set_up, folder)


def test_a_missing_split_is_named(tmp_path, set_up):
    write_stripes(tmp_path / "images", 4)
    match = "needs the split 'validation', but .* only has 'train': give files for it, or validation_fraction"
    assert_refused(match, set_up, tmp_path / "images")


def test_missing_columns_list_those_found(folder, tmp_path, set_up):
    assert_refused(
        r"'train' has no column 'photo'; its columns are \['image', 'label'\]", set_up, folder, image="photo"
    )
    assert_refused(r"'train' has no column 'class'; its columns are", set_up, folder, label="class")
    assert_refused(r"'class'", set_up, folder, label="class", labels=["a", "b"])


def test_a_column_of_something_else_is_no_image(folder, tmp_path, set_up):
    file = tmp_path / "train.parquet"
    hub_rows(files_in(folder)[:2], [0, 1], Value("int64")).to_parquet(file)
    match = (
        r"'label' of the split 'train' holds Value\('int64'\), which is no image: name the column of the image files"
    )
    assert_refused(match, set_up, file, image="label", validation_fraction=0.5)


def test_a_place_that_does_not_exist_is_named_first(set_up):
    assert_refused("path './nowhere' does not exist", set_up, "./nowhere", processor=None)


def test_name_and_revision_are_for_the_hub(folder, set_up):
    assert_refused("leave out name='full' and revision=None", set_up, folder, name="full")


def test_a_processor_is_needed(folder, set_up, tmp_path):
    assert_refused(
        "No processor is given, and there is no LightningModule with a backbone", set_up, folder, processor=None
    )
    bert = save_tiny_bert(tmp_path / "bert")
    assert_refused(f"processor '{bert}' could not be loaded", set_up, folder, processor=bert)


def test_without_pillow_its_extra_is_named(folder, set_up, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert_refused(r'install the vision extra, pip install "lit-sparse\[vision\]"', set_up, folder)

"""lit_sparse.modules.metrics against scikit-learn and SciPy on random predictions."""

import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from lit_sparse.errors import UsageError
from lit_sparse.modules.metrics import MULTI_LABEL, build_metrics, predictions

BATCHES = (7, 1, 32, 60)


def random_classes(count, seed):
    """Logits whose arg-max agrees with the labels about half the time."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(count, (sum(BATCHES),), generator=generator)
    logits = torch.randn(len(labels), count, generator=generator)
    logits[torch.arange(len(labels)), labels] += 1.0
    return logits, labels


def accumulate(metrics, logits, labels, num_labels):
    """What the metrics say after batches of different sizes."""
    for some_logits, some_labels in zip(logits.split(BATCHES), labels.split(BATCHES), strict=True):
        for metric in metrics.values():
            metric.update(predictions(some_logits, num_labels), some_labels)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_classification_metrics_are_those_of_scikit_learn(count, seed):
    logits, labels = random_classes(count, seed)
    found = accumulate(build_metrics(["accuracy", "f1", "matthews"], count), logits, labels, count)
    true, predicted = labels.numpy(), logits.numpy().argmax(-1)
    assert found == pytest.approx(
        {
            "accuracy": sk.accuracy_score(true, predicted),
            "f1": sk.f1_score(true, predicted, average="binary" if count == 2 else "macro"),
            "matthews": sk.matthews_corrcoef(true, predicted),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("true", [[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("predicted", [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
def test_matthews_of_a_single_class_is_zero(count, true, predicted):
    metric = build_metrics(["matthews"], count)["matthews"]
    metric.update(torch.tensor(predicted), torch.tensor(true))
    assert float(metric.compute()) == pytest.approx(sk.matthews_corrcoef(true, predicted), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_regression_metrics_are_those_of_scipy(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(11, (sum(BATCHES),), generator=generator) / 2  # with ties, as STS-B has them
    logits = (labels + 2 * torch.randn(len(labels), generator=generator)).unsqueeze(1)
    found = accumulate(build_metrics(["pearson", "spearman"], 1), logits, labels, 1)
    true, predicted = labels.numpy(), logits.squeeze(1).numpy()
    expected = {"pearson": stats.pearsonr(predicted, true)[0], "spearman": stats.spearmanr(predicted, true)[0]}
    assert found == pytest.approx(expected, abs=1e-4)


def random_sets(count, seed):
    """Logits of several labels per row, of which the last is always true and the one before it never."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(sum(BATCHES), count, generator=generator) < 0.3).float()
    labels[:, -1], labels[:, -2] = 1, 0
    return torch.randn(labels.shape, generator=generator) + labels, labels


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_labels_are_those_of_scikit_learn(count, seed):
    logits, labels = random_sets(count, seed)
    metrics = build_metrics(MULTI_LABEL, count, multi_label=True)
    for some_logits, some_labels in zip(logits.split(BATCHES), labels.split(BATCHES), strict=True):
        for metric in metrics.values():
            metric.update(predictions(some_logits, count, multi_label=True), some_labels.long())
    true, predicted = labels.numpy(), (1 / (1 + (-logits).exp()) > 0.5).numpy()
    assert {name: float(metric.compute()) for name, metric in metrics.items()} == pytest.approx(
        {
            "accuracy": 1 - sk.hamming_loss(true, predicted),
            "f1_macro": sk.f1_score(true, predicted, average="macro", zero_division=0),
            "f1_micro": sk.f1_score(true, predicted, average="micro"),
            "auroc": sum(sk.roc_auc_score(true[:, i], logits[:, i]) for i in range(count - 2)) / (count - 2),
        },
        abs=1e-6,
    )


def test_half_precision_predictions_are_compared_in_float32():
    assert predictions(torch.zeros(4, 1, dtype=torch.bfloat16), 1).dtype == torch.float32


@pytest.mark.parametrize(
    ("names", "num_labels", "message"),
    [
        (["acc"], 2, r"metrics \['acc'\] do not exist for classification with 2 labels"),
        (["accuracy", "pearson"], 3, r"metrics \['pearson'\] .* are \['accuracy', 'f1', 'matthews'\]"),
        (["accuracy"], 1, r"regression \(one label\); there are \['pearson', 'spearman'\]"),
    ],
)
def test_a_metric_of_another_kind_of_task_is_an_error(names, num_labels, message):
    with pytest.raises(UsageError, match=message):
        build_metrics(names, num_labels)


def test_a_metric_of_one_class_per_row_is_an_error_with_several_labels():
    with pytest.raises(UsageError, match=r"metrics \['f1'\] do not .* any number of them per row; .* 'f1_macro'"):
        build_metrics(["f1"], 3, multi_label=True)

import numpy as np
import onnx
import onnxruntime
import pytest
from sklearn.metrics import log_loss

from cifar_core.calibration import (
    FORMS,
    SCALE_RANGE,
    UNCALIBRATED,
    Calibration,
    calibration_interval,
    caution,
    choose_calibration,
    expected_calibration_error,
    fit,
    negative_log_likelihood,
    reliability,
)
from cifar_core.calibration_graph import add_calibration


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def drawn(probabilities):
    """Labels drawn from these probabilities."""
    random = np.random.default_rng(1).random((len(probabilities), 1))
    return (random > probabilities.cumsum(1)).sum(1).clip(0, probabilities.shape[1] - 1)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 2, (20_000, 5))


@pytest.fixture
def labels(logits):
    """Labels drawn from the probabilities of the logits."""
    return drawn(softmax(logits))


def test_the_calibration_error_is_the_weighted_difference_of_confidence_and_accuracy():
    # Two predictions at 0.9, one of them correct; two at 0.6, both correct: |0.5 - 0.9| / 2 + |1 - 0.6| / 2.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]])
    labels = np.array([0, 1, 1, 0])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.4)
    bins = reliability(probabilities, labels)
    assert [(group.count, group.confidence, group.accuracy) for group in bins] == [
        (2, pytest.approx(0.6), 1.0),
        (2, pytest.approx(0.9), 0.5),
    ]


def test_a_bin_includes_its_upper_end():
    probabilities = np.array([[10 / 15, 5 / 15], [10.01 / 15, 4.99 / 15]])
    assert [group.count for group in reliability(probabilities, np.array([0, 0]))] == [1, 1]
    assert reliability(np.array([[1.0, 0.0]]), np.array([0]))[0].confidence == 1.0


def test_the_probabilities_that_labels_were_drawn_from_are_calibrated(logits, labels):
    assert expected_calibration_error(softmax(logits), labels) < 0.015
    assert expected_calibration_error(softmax(3 * logits), labels) > 0.1


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_the_temperature_is_the_factor_by_which_logits_were_scaled(logits, labels, factor):
    scaled = fit("temperature", factor * logits, labels).scaled(logits)
    assert logits / scaled == pytest.approx(factor, rel=0.03)
    assert np.ptp(scaled / logits) == pytest.approx(0, abs=1e-9)


def loss(calibration, logits, labels):
    return float(-np.log(calibration.probabilities(logits)[np.arange(len(labels)), labels]).mean())


def test_the_fitted_scale_has_the_least_loss_and_changes_no_class(logits, labels):
    sharp = 3 * logits
    for form in FORMS:
        calibration = fit(form, sharp, labels)
        least = loss(calibration, sharp, labels)
        for power in range(len(calibration.coefficients)):
            for change in (-0.1, 0.1):
                changed = list(calibration.coefficients)
                changed[power] += change
                assert least <= loss(Calibration(form, tuple(changed)), sharp, labels) + 1e-6
        assert (calibration.probabilities(sharp).argmax(1) == sharp.argmax(1)).all()


def smoothed(logits):
    """Logits whose confident answers are underconfident and whose doubtful answers are overconfident."""
    largest = np.sort(logits, axis=1)
    gap = (largest[:, -1] - largest[:, -2])[:, None]
    return logits / np.logaddexp(0, -0.5 + 0.5 * gap)


def test_a_scale_that_depends_on_the_gap_mends_what_one_temperature_cannot(logits, labels):
    distorted = smoothed(logits)
    chosen = choose_calibration(distorted[::2], labels[::2])
    one_temperature = fit("temperature", distorted[::2], labels[::2])
    others, true = distorted[1::2], labels[1::2]
    assert FORMS[chosen.form].degree > 0
    before = expected_calibration_error(one_temperature.probabilities(others), true)
    assert expected_calibration_error(chosen.probabilities(others), true) < 0.6 * before
    assert loss(chosen, others, true) < loss(one_temperature, others, true)


def test_a_scale_of_their_own_for_the_other_classes_mends_what_one_scale_cannot(logits, labels):
    above_second = logits - np.sort(logits, axis=1)[:, -2:-1]
    flat = np.where(above_second > 0, above_second, 0.3 * above_second)
    chosen = choose_calibration(flat[::2], labels[::2])
    assert FORMS[chosen.form].rest_degree is not None
    others, true = flat[1::2], labels[1::2]
    np.testing.assert_allclose(chosen.probabilities(others), softmax(logits[1::2]), atol=0.05)
    assert (chosen.probabilities(others).argmax(1) == others.argmax(1)).all()
    one_scale = min(loss(fit(form, flat[::2], labels[::2]), others, true) for form in ("gap-quadratic", "log-entropy"))
    assert loss(chosen, others, true) < one_scale - 0.01


@pytest.mark.parametrize("count", [200, 203])
def test_each_image_is_scored_once_by_a_calibration_that_was_fitted_on_all_others_of_its_fold(monkeypatch, count):
    fits, scored = [], []

    def record_fit(form, logits, labels):
        assert (labels == logits[:, 0]).all()
        fits.append((form, set(labels)))
        return UNCALIBRATED

    def record_scores(calibration, logits, labels):
        assert (labels == logits[:, 0]).all()
        scored.append(set(labels))
        return np.zeros(len(labels))

    monkeypatch.setattr("cifar_core.calibration.fit", record_fit)
    monkeypatch.setattr("cifar_core.calibration._losses", record_scores)
    numbers = np.arange(count)  # every image is known by its label and its logits
    choose_calibration(np.stack([numbers, numbers * 0.0], axis=1), numbers)
    *in_folds, last = fits
    assert last == ("temperature", set(numbers))
    assert len(in_folds) == len(scored) == 5 * len(FORMS)
    for (_, fitted), part in zip(in_folds, scored, strict=True):
        assert not fitted & part
        assert fitted | part == set(numbers)
    for form in FORMS:
        parts = [part for (name, _), part in zip(in_folds, scored, strict=True) if name == form]
        assert sorted(number for part in parts for number in part) == list(numbers)
        assert {len(part) for part in parts} <= {count // 5, count // 5 + 1}


def test_few_images_get_a_temperature(logits, labels):
    assert choose_calibration(smoothed(logits)[:199], labels[:199]).form == "temperature"
    assert "only 199 images are held out" in caution(199)
    assert "train with a larger validation_images" in caution(199)
    assert caution(200) is None


@pytest.mark.parametrize("count", [1, 2, 7, 19])
def test_probabilities_are_not_calibrated_on_a_handful_of_images(logits, labels, count):
    chosen = choose_calibration(logits[:count], labels[:count])
    np.testing.assert_allclose(chosen.probabilities(logits), softmax(logits), atol=1e-12)
    assert chosen == UNCALIBRATED
    assert f"only {count} images are held out, too few" in caution(count)


@pytest.mark.parametrize(("count", "greatest"), [(20, 3), (50, 5), (100, 7)])
def test_the_scale_stays_away_from_its_limit_where_few_images_are_all_classified_correctly(logits, count, greatest):
    """Their cross-entropy is the least at the limit of the scale, which tells nothing about other images."""
    few, correct = logits[:count], logits[:count].argmax(1)
    assert fit("temperature", few, correct).scaled(few).max() > 10 * few.max()
    assert 1 < choose_calibration(few, correct).scaled(few).max() / few.max() < greatest


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_with_few_images_the_loss_on_others_hardly_ever_exceeds_that_without_calibration(logits, labels, factor):
    others, true = factor * logits[10_000:], labels[10_000:]
    before = loss(UNCALIBRATED, others, true)
    excess = [
        loss(choose_calibration(factor * logits[first : first + 20], labels[first : first + 20]), others, true) - before
        for first in range(0, 2000, 20)
    ]
    assert np.mean(excess) < 0.02
    assert np.max(excess) < 0.15


def test_with_nearly_enough_images_the_cautious_temperature_is_the_fitted_one(logits, labels):
    for factor in (0.5, 2.0):
        few, true = factor * logits[:199], labels[:199]
        cautious, fitted = (
            each.scaled(few) / few for each in (choose_calibration(few, true), fit("temperature", few, true))
        )
        assert cautious.max() == pytest.approx(fitted.max(), rel=0.05)


def test_a_form_that_is_not_needed_costs_next_to_nothing(logits, labels):
    chosen = choose_calibration(2 * logits[:2000], labels[:2000])
    others, true = 2 * logits[2000:], labels[2000:]
    least = loss(fit("temperature", others, true), others, true)
    assert loss(chosen, others, true) < least + 0.002


def test_the_scale_stays_within_its_limits_for_any_logits():
    logits = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [30.0, 29.0, 0.0]])
    for coefficients in ((0.0, 5.0, -1.0), (-50.0, -3.0, 0.0)):
        calibration = Calibration("gap-quadratic", coefficients)
        scales = calibration.scaled(logits)[logits != 0] / logits[logits != 0]
        assert ((scales >= SCALE_RANGE[0] - 1e-9) & (scales <= SCALE_RANGE[1] + 1e-9)).all()
        assert np.isfinite(calibration.probabilities(logits)).all()
        assert calibration.probabilities(logits)[2].argmax() == 0


def test_both_of_two_scales_stay_within_their_limits():
    logits = np.array([[1e4, 0.0, -1e4], [30.0, 29.0, 0.0], [3.0, 1.0, -2.0]])
    above_second = logits - np.array([[0.0], [29.0], [1.0]])
    differs = above_second != 0
    for coefficients in ((0.0, 5.0, -1.0, -50.0, 0.0), (-50.0, -3.0, 0.0, 0.0, 5.0)):
        calibration = Calibration("two-scales-quadratic-linear-rest", coefficients)
        scales = calibration.scaled(logits)[differs] / above_second[differs]
        assert scales.min() == pytest.approx(SCALE_RANGE[0])
        assert scales.max() <= SCALE_RANGE[1] + 1e-9
        assert (calibration.probabilities(logits).argmax(1) == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 5])
def test_the_operators_of_a_graph_compute_the_calibration(form, classes):
    shape = ["batch", classes]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["logits"])],
        "logits",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    calibration = Calibration(form, (0.9, -0.28, 0.1, 0.7, -0.2)[: FORMS[form].coefficients])
    content = add_calibration(model.SerializeToString(), calibration)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    logits = np.random.default_rng(3).normal(0, 4, (200, classes)).astype(np.float32)
    logits[0] = 0  # equal logits
    logits[1] = [60] + [0] * (classes - 1)
    for batch in (1, 200):
        (found,) = session.run(["probabilities"], {"x": logits[:batch]})
        np.testing.assert_allclose(found, calibration.probabilities(logits[:batch]), atol=2e-6)


def test_bins_of_equal_mass_hold_equal_numbers_and_weigh_equally():
    confidence = np.linspace(0.6, 0.99, 150)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.zeros(150, int)  # all correct
    assert [group.count for group in reliability(probabilities, labels, equal_mass=True)] == [10] * 15
    assert expected_calibration_error(probabilities, labels, True) == pytest.approx(1 - confidence.mean())


@pytest.mark.parametrize("equal_mass", [False, True])
def test_the_bootstrap_interval_is_that_of_samples_with_replacement(logits, labels, equal_mass):
    values, classes = softmax(logits[:2000]), labels[:2000]
    random = np.random.RandomState(0)
    errors = []
    for _ in range(1000):
        rows = random.randint(0, 2000, 2000)
        errors.append(expected_calibration_error(values[rows], classes[rows], equal_mass))
    expected = tuple(np.percentile(errors, (2.5, 97.5)))
    assert calibration_interval(values, classes, equal_mass) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_interval_contains_the_error_and_shrinks_with_the_number_of_images(logits, labels):
    sharp = softmax(2 * logits)
    widths = []
    for count in (500, 20_000):
        low, high = calibration_interval(sharp[:count], labels[:count])
        assert low < expected_calibration_error(sharp[:count], labels[:count]) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_loss_is_that_of_scikit_learn(logits, labels):
    assert negative_log_likelihood(logits, labels) == pytest.approx(log_loss(labels, softmax(logits)))


def test_the_scale_has_a_limit_if_all_predictions_are_correct():
    logits = np.eye(4) * 9
    for form in FORMS:
        assert np.abs(fit(form, logits, np.arange(4)).scaled(logits)).max() <= SCALE_RANGE[1] * np.ptp(logits)

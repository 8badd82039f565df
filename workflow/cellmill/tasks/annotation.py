"""Cell-type annotation across batches: labels of a batch that was left out, from the labels of the others.

The protocol, its controls and its traps are in docs/tasks/annotation.md.

Legend: N cells, T training cells, S test cells, E width of an embedding.
"""

import warnings
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cellmill.randomness import uniform
from cellmill.tasks.base import NotPossible, Task, check_finite
from cellmill.tasks.data import Target


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How annotation is scored."""

    neighbors: int = field(default=15, metadata={"description": "Neighbours that vote, by 1/distance.", "ge": 1})
    distance: Literal["cosine", "euclidean"] = field(default="cosine", metadata={"description": "Between cells."})
    inverse_regularisation: tuple[float, ...] = field(
        default=(0.001, 0.01, 0.1, 1.0), metadata={"description": "Values of C that the linear probe chooses from."}
    )


def knn_predict(x_TE: np.ndarray, labels_T: np.ndarray, x_SE: np.ndarray, neighbors: int, distance: str) -> np.ndarray:
    """Labels of `x_SE` by a vote of the nearest training cells, each weighted by 1/distance.

    The weights let a type with fewer than half of `neighbors` training cells win where its cells are the nearest.
    """
    from sklearn.neighbors import KNeighborsClassifier

    voters = KNeighborsClassifier(min(neighbors, len(x_TE)), weights="distance", metric=distance, algorithm="brute")
    return voters.fit(x_TE, labels_T).predict(x_SE)


def _inner_folds(labels_T: np.ndarray, batches_T: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, validation rows): each training batch left out, or three random parts of the only one."""
    names = np.unique(batches_T)
    if len(names) > 1:
        parts_T = batches_T
    else:
        order = np.argsort(uniform(seed, "inner folds", np.arange(len(labels_T))), kind="stable")
        parts_T = np.empty(len(labels_T), int)
        parts_T[order[np.argsort(labels_T[order], kind="stable")]] = np.arange(len(labels_T)) % 3  # spreads each type
        names = np.arange(3)
    folds = [(np.flatnonzero(parts_T != name), np.flatnonzero(parts_T == name)) for name in names]
    return [(train, held) for train, held in folds if len(held) and len(np.unique(labels_T[train])) > 1]


def _probe_path(x_TE: np.ndarray, labels_T: np.ndarray, cs: tuple[float, ...]):
    """Fitted (scaler, classifier), one for each C in ascending order; each fit starts from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x_TE)
    classifier = LogisticRegression(solver="lbfgs", max_iter=1000, warm_start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # embeddings that no probe fits are scored as they are
        for c in sorted(cs):
            yield c, scaler, classifier.set_params(C=c).fit(scaler.transform(x_TE), labels_T)


def probe_predict(
    x_TE: np.ndarray, labels_T: np.ndarray, batches_T: np.ndarray, x_SE: np.ndarray, cs: tuple[float, ...], seed: int
) -> np.ndarray:
    """Labels of `x_SE` by multinomial logistic regression (L2) on embeddings standardised by the training cells.

    C has the best mean macro-F1 when each training batch in turn is held out; the test cells play no part. Of equally
    good values the smallest is taken.
    """
    from sklearn.metrics import f1_score

    cs = tuple(sorted(cs))
    scores = np.zeros(len(cs))
    if len(cs) > 1:
        for train, held in _inner_folds(labels_T, batches_T, seed):
            for i, (_, scaler, classifier) in enumerate(_probe_path(x_TE[train], labels_T[train], cs)):
                predicted = classifier.predict(scaler.transform(x_TE[held]))
                scores[i] += f1_score(labels_T[held], predicted, average="macro", zero_division=0)
    best = cs[int(np.argmax(scores))]
    for c, scaler, classifier in _probe_path(x_TE, labels_T, cs):
        if c == best:
            return classifier.predict(scaler.transform(x_SE))
    raise AssertionError("unreachable: best is one of cs")


def agreement(labels_S: np.ndarray, predicted_S: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro-F1 and weighted F1, as scikit-learn defines them."""
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    # recall over the true types only: balanced accuracy without its warning about types that are only predicted
    present = np.unique(labels_S)
    return {
        "accuracy": accuracy_score(labels_S, predicted_S),
        "balanced_accuracy": recall_score(labels_S, predicted_S, labels=present, average="macro", zero_division=0),
        "macro_f1": f1_score(labels_S, predicted_S, average="macro", zero_division=0),
        "weighted_f1": f1_score(labels_S, predicted_S, average="weighted", zero_division=0),
    }


def _fault(labels_T: np.ndarray, test_N: np.ndarray) -> str | None:
    """Why a fold cannot be scored, whatever the embedding; None where it can."""
    if not len(labels_T):
        return "there is only one batch, so none can be left out"
    if len(np.unique(labels_T)) < 2:
        return "the other batches hold fewer than two cell types"
    if not test_N.any():
        return "none of the batch's cell types is in another batch"
    return None


class Annotation(Task):
    """kNN (zero_shot) and a linear probe (linear_probe), leaving one batch out at a time."""

    name = "annotation"
    regimes = ("zero_shot", "linear_probe")
    metrics = {"accuracy": True, "balanced_accuracy": True, "macro_f1": True, "weighted_f1": True}
    Settings = Settings

    def start(self) -> None:
        """See `Task.start`."""
        import sklearn.linear_model
        import sklearn.metrics
        import sklearn.neighbors  # noqa: F401

    def score(self, x_NE: np.ndarray, target: Target, seed: int) -> list[dict]:
        """See `Task.score`. Splits: ``leave_out:BATCH`` for each batch, and ``mean``.

        The mean is over the folds that the data allow, the same for every embedding. Where one of these has no value,
        the mean has none either: embeddings must not be ranked by means over different folds.
        """
        rows = []
        names = tuple(self.metrics)
        for regime in self.regimes:
            folds, asked = [], []
            for batch in np.unique(target.batches_N):
                train_N = target.batches_N != batch
                # a type that no training batch holds cannot be named by anyone: its cells are not asked for
                test_N = ~train_N & np.isin(target.labels_N, target.labels_N[train_N])
                fold = self.measure(
                    lambda train_N=train_N, test_N=test_N, regime=regime: self._fold(
                        x_NE, target, train_N, test_N, regime, seed
                    ),
                    names,
                    split=f"leave_out:{batch}",
                    regime=regime,
                    n=int(test_N.sum()),
                )
                folds += fold
                if not _fault(target.labels_N[train_N], test_N):
                    asked += fold
            rows += folds
            for metric in names:
                rows.append(self._mean(*([row for row in part if row["metric"] == metric] for part in (folds, asked))))
        return rows

    def _fold(self, x_NE, target, train_N, test_N, regime, seed) -> dict[str, float]:
        check_finite(x_NE)
        labels_T = target.labels_N[train_N]
        if fault := _fault(labels_T, test_N):
            raise NotPossible(fault)
        if regime == "zero_shot":
            predicted = knn_predict(
                x_NE[train_N], labels_T, x_NE[test_N], self.settings.neighbors, self.settings.distance
            )
        else:
            predicted = probe_predict(
                x_NE[train_N],
                labels_T,
                target.batches_N[train_N],
                x_NE[test_N],
                self.settings.inverse_regularisation,
                seed,
            )
        return agreement(target.labels_N[test_N], predicted)

    def _mean(self, folds: list[dict], asked: list[dict]) -> dict:
        """The mean row of one metric over the folds `asked`; null where there are none or one of them has no value."""
        reasons = [row["reason"] for row in asked or folds if row["value"] is None]
        return folds[0] | {
            "split": "mean",
            "value": None if reasons else float(np.mean([row["value"] for row in asked])),
            "n": sum(row["n"] for row in asked),
            "seconds": sum(row["seconds"] for row in folds),
            "reason": reasons[0] if reasons else None,
        }


TASK = Annotation

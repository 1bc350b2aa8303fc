"""Host linear algebra: NumPy's OpenBLAS against NumPy, and what happens without it."""

import numpy as np
import pytest

from pico_tg.optim import linalg


@pytest.fixture(params=["openblas", "numpy"])
def backend(request, monkeypatch):
    if request.param == "openblas":
        if linalg.openblas() is None:
            pytest.skip("this NumPy brings no OpenBLAS")
    else:
        monkeypatch.setattr(linalg, "openblas", lambda: None)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 201])
def test_qr(size, backend):
    a = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
    q = linalg.qr(a)
    assert q.dtype == np.float32
    expected = np.linalg.qr(a.astype(np.float64))[0]
    np.testing.assert_allclose(q * np.sign((q * expected).sum(0)), expected, atol=1e-3)
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_qr_of_a_singular_matrix_is_orthonormal(rank, backend):
    rng = np.random.default_rng(rank)
    a = (rng.standard_normal((12, rank)) @ rng.standard_normal((rank, 12))).astype(np.float32)
    q = linalg.qr(a)
    np.testing.assert_allclose(q.T @ q, np.eye(12), atol=1e-5)


def test_qr_leaves_its_argument_alone(backend):
    a = np.asfortranarray(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32))
    before = a.copy()
    linalg.qr(a)
    np.testing.assert_array_equal(a, before)


def test_eigenvectors_largest_first():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a = ((basis * [1, 5, 3, 0.1, 0, 2]) @ basis.T).astype(np.float32)
    vectors = linalg.eigenvectors(a)
    np.testing.assert_allclose(np.diag(vectors.T @ a @ vectors), [5, 3, 2, 1, 0.1, 0], atol=1e-5)
    with pytest.raises(np.linalg.LinAlgError):
        linalg.eigenvectors(np.full((3, 3), np.nan, np.float32))


def test_parallel_runs_all_and_passes_errors_on(backend):
    done = []
    linalg.parallel([lambda i=i: done.append(i) for i in range(20)])
    assert sorted(done) == list(range(20))
    linalg.parallel([])

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        linalg.parallel([fail])


def test_parallel_gives_the_threads_back():
    if (library := linalg.openblas()) is None:
        pytest.skip("this NumPy brings no OpenBLAS")
    before = library.scipy_openblas_get_num_threads64_()
    linalg.parallel([lambda: None])
    assert library.scipy_openblas_get_num_threads64_() == before

"""A symmetric matrix as Q T Qᵀ with T tridiagonal, and what LAPACK makes of T; Python's lock is released meanwhile.

Of an eigendecomposition, bringing the matrix to this form is the small part (4/3 n³ operations). What is asked about a
few directions can be answered from there, and no n eigenvectors are made. SciPy's own wrappers of these routines hold
Python's lock, so that modules can't be computed side by side: here they are called through the pointers that
``scipy.linalg.cython_lapack`` exports for other compilers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.errors import RegraftError

# Of the blocked routines: columns that are worked on at once; a work space of more is not used.
_BLOCK = 64


class LapackError(RegraftError):
    """A routine ended without a result."""


class Tridiagonal:
    """The tridiagonal form T of a symmetric matrix G = Q T Qᵀ.

    Attributes:
        diagonal: of T, (n,), float64.
        beside: what stands beside it, (n − 1,), float64.
    """

    def __init__(self, lower: Tensor) -> None:
        """Bring a matrix to this form, in single precision; it is overwritten.

        Args:
            lower: float32 (n, n) on the CPU, n ≥ 2; what lies above the diagonal is not read.

        Raises:
            LapackError: the matrix holds NaN or Inf.
        """
        n = len(lower)
        # Its rows are LAPACK's columns.
        self._reflectors = lower.contiguous().numpy()
        diagonal, beside, self._scales = (np.empty(size, np.float32) for size in (n, n - 1, n - 1))
        work = np.empty(_BLOCK * n, np.float32)
        parts = (self._reflectors, n, diagonal, beside, self._scales, work, len(work))
        with _one_thread:
            _call("ssytrd", b"U", n, *parts)
        self.diagonal, self.beside = diagonal.astype(np.float64), beside.astype(np.float64)

    def values(self) -> NDArray[np.float64]:
        """The eigenvalues, smallest first, (n,)."""
        found, beside = self.diagonal.copy(), self.beside.copy()
        _call("dsterf", len(found), found, beside)
        return found

    def vectors(self, values: NDArray[np.float64]) -> Tensor:
        """Eigenvectors of T, by inverse iteration; (n, k), float64, orthonormal columns.

        Args:
            values: neighbouring eigenvalues, smallest first, (k,).

        Raises:
            LapackError: the iteration ends without one of them.
        """
        n, k = len(self.diagonal), len(values)
        found = np.empty((k, n))
        # One block, that ends at n.
        block, end = np.ones(n, np.intc), np.full(n, n, np.intc)
        work, whole_work, failed = np.empty(5 * n), np.empty(n, np.intc), np.empty(max(k, 1), np.intc)
        parts = (values, block, end, found, n, work, whole_work, failed)
        _call("dstein", n, self.diagonal, self.beside, k, *parts)
        return torch.from_numpy(found).T

    def towards(self, x: Tensor) -> Tensor:
        """Qᵀ x of x (n, k), float32."""
        return self._turned(x, b"T")

    def back(self, x: Tensor) -> Tensor:
        """Q x of x (n, k), float32."""
        return self._turned(x, b"N")

    def _turned(self, x: Tensor, way: bytes) -> Tensor:
        n, k = x.shape
        turned = x.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format).numpy()
        work = np.empty(_BLOCK * max(k, 1) + 65 * _BLOCK, np.float32)
        with _one_thread:
            _call("sormtr", b"L", b"U", way, n, k, self._reflectors, n, self._scales, turned, n, work, len(work))
        return torch.from_numpy(turned).T

    def solved(self, x: NDArray[np.float64], shift: complex) -> NDArray[np.complex128]:
        """(T − z)⁻¹ x, (k, n).

        Args:
            x: the columns as rows, (k, n).
            shift: z, not an eigenvalue.
        """
        n = len(self.diagonal)
        beside = self.beside.astype(np.complex128)
        above, diagonal, found = beside.copy(), self.diagonal - shift, x.astype(np.complex128, order="C")
        _call("zgtsv", n, len(x), beside, diagonal, above, found, n)
        return found


def _call(name: str, *arguments: NDArray[Any] | bytes | float) -> None:
    """Call a routine of LAPACK whose last argument tells whether it worked."""
    told = ctypes.c_int(0)
    _routine(name)(*map(_passed, arguments), ctypes.byref(told))
    if told.value:
        raise LapackError(f"LAPACK's {name} ended with {told.value}")


class _OneThread:
    """While any call is under way, OpenBLAS has one thread: those of several calls would wait for one another."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limits = _openblas().limit(limits=1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


_one_thread = _OneThread()


@cache
def _openblas() -> Any:
    from threadpoolctl import ThreadpoolController

    # Loads SciPy's.
    _routine("ssytrd")
    return ThreadpoolController().select(internal_api="openblas")


def _passed(argument: NDArray[Any] | bytes | float) -> Any:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, bytes):
        return ctypes.byref(ctypes.c_char(argument))
    return ctypes.byref(ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_double(argument))


@cache
def _routine(name: str) -> Callable[..., None]:
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    routine: Callable[..., None] = ctypes.CFUNCTYPE(None)(pointer_of(capsule, name_of(capsule)))
    return routine

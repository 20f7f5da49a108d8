"""What every kind of Jacobian can do, and what is known of one before any number is: its pattern and its form."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from parscan import exponents

UNROLLED = 8  # up to this size XLA's fused multiply-and-sum beats a call to a GEMM of tiny matrices


class Jacobian:
    """A linear map from vectors (..., n) to vectors (..., p), or a stack of independent ones: the leading axes of its arrays.

    A leading axis of length 1 stands for any length: what is the same for all steps, or for all blocks, is kept and multiplied once.
    A kind is one subclass in one file: a frozen dataclass registered by `kind`, with the operations below and a way to be recognised.
    Products are taken at the highest precision the device has, since a long chain compounds what each product loses.

    Example:
        >>> one = parscan.Diagonal(jnp.array([2.0, 3.0]))
        >>> isinstance(one, parscan.jacobians.Jacobian)
        True
        >>> one.apply(jnp.ones(2)), one.after(one).to_dense()
        (Array([2., 3.], dtype=float32), Array([[4., 0.],
               [0., 9.]], dtype=float32))
    """

    shifts_freely: ClassVar[bool] = True  # whether `shifted` takes any rows, or only the exponents of another of its kind

    pays_below: ClassVar[float] = 1.0  # as a share of a full matrix's bytes: the most that it may take to be faster than one

    must_last: ClassVar[int] = 1  # products, each of two of the one before, that must be smaller than full matrices for it to be faster in a tree

    @property
    def size(self) -> int:
        """n, the length of the vectors it acts on."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """p, the length of the vectors it makes."""
        return self.size

    def apply(self, vector: Array) -> Array:
        """J v; vector (..., n), the result (..., p)."""
        raise NotImplementedError

    def transpose(self) -> Jacobian:
        """Jᵀ, which `apply` applies to cotangents."""
        raise NotImplementedError

    def after(self, first: Any) -> Jacobian:
        """The product self · first with another of this kind, `first` being applied first. A kind that fills in returns a `Dense` where that is smaller."""
        raise NotImplementedError

    def paired(self, first: Any) -> tuple[Any, Any]:
        """Itself and another of this kind as `shifted` and `after` need them, `first` being applied first; what cannot stay of its kind is a `Dense`."""
        return self, first

    def stackable(self, other: Any) -> tuple[Any, Any] | None:
        """Itself and another of this kind with arrays of equal shapes but for leading axes, to be put one after the other; None if they cannot be."""
        return (self, other) if jax.tree.structure(self) == jax.tree.structure(other) else None

    def balanced(self) -> tuple[Any, Array]:
        """J as a mantissa and one exponent a column, int32 (..., n)."""
        raise NotImplementedError

    def shifted(self, rows: Array) -> tuple[Any, Array]:
        """2^rows · J, balanced anew, for a J that is balanced; rows int32 (..., p), exponents int32 (..., n)."""
        raise NotImplementedError

    def shifted_before(self, second: Any, rows: Array) -> tuple[Any, Array]:
        """`shifted` by rows int32 (..., p), the exponents of `second`, which is applied after it: where both are the same for all blocks, so are these."""
        return self.shifted(rows)

    def to_dense(self) -> Array:
        """The full matrix, (..., p, n)."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def product_flops(self) -> int:
        """Floating-point operations of `after` with another like it."""
        raise NotImplementedError

    @property
    def apply_flops(self) -> int:
        """Floating-point operations of `apply`."""
        return 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self))

    @classmethod
    def of(cls, other: Any) -> Any:
        """`other`, a map of a kind that the table of products lets this one stand for, written as this kind."""
        raise NotImplementedError

    @classmethod
    def recognised(cls, evidence: Evidence) -> Form | None:
        """How Jacobians with this evidence are formed as this kind; None if they are not of it, or if there is no telling by evidence."""
        return None

    @classmethod
    def from_images(cls, images: Array, form: Form) -> Any:
        """From the images of the seeds of `form`: images (..., pushes, p), images[..., k, :] = J s_k."""
        raise NotImplementedError

    @classmethod
    def abstract(cls, form: Form, dtype: Any) -> Any:
        """What is formed by `form` in this `dtype`, with shapes in the place of arrays."""
        return jax.eval_shape(lambda images: cls.from_images(images, form), jax.ShapeDtypeStruct((max(form.pushes, 1), form.shape[0]), dtype))


@dataclass_transform(frozen_default=True)
def kind(*, static: tuple[str, ...] = ()):
    """Class decorator: a frozen dataclass whose fields are arrays (or Jacobians), but for `static` ones, as a pytree.

    Args:
        static: names of the fields that are no arrays, and hashable.

    Returns:
        the decorator, class -> class.

    Example:
        >>> @parscan.jacobians.kind(static=("n",))
        ... class Scaled(parscan.jacobians.Jacobian):
        ...     factor: jax.Array
        ...     n: int
        >>> jax.tree.leaves(Scaled(2.0, n=3))
        [2.0]
    """

    def register(cls):
        cls = dataclass(frozen=True)(cls)
        arrays = [field.name for field in fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=list(static))

    return register


class _ByValue:
    """Equal to any other of its class with the same key."""

    _key: tuple[Any, ...]

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._key == other._key


class Index(_ByValue):
    """A constant array of integers that compares by value, and may be static.

    Args:
        values: integers of any shape, such as (n,); held as int32.

    Example:
        >>> parscan.jacobians.Index([2, 0, 1]) == parscan.jacobians.Index([2, 0, 1])
        True
    """

    def __init__(self, values: Any):
        self.values = np.ascontiguousarray(values, np.int32)
        self._key = (self.values.shape, self.values.tobytes())

    def __repr__(self) -> str:
        return f"Index({np.array2string(self.values, threshold=8, separator=', ')})"


class Pattern(_ByValue):
    """Where a matrix may be non-zero: `rows[k]`, `columns[k]`, sorted by row and then by column, each pair once. Compares by value.

    Args:
        shape: (p, n) of the matrix.
        rows: integers (count,), 0 … p - 1.
        columns: integers (count,), 0 … n - 1.

    Example:
        >>> parscan.Pattern((2, 3), [0, 1, 1], [0, 1, 2]).bandwidths
        (0, 1)
    """

    def __init__(self, shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray):
        self.shape = shape
        codes = np.unique(np.asarray(rows, np.int64) * max(shape[1], 1) + np.asarray(columns, np.int64))
        self.rows, self.columns = np.divmod(codes, max(shape[1], 1))
        self._key = (shape, codes.tobytes())

    @classmethod
    def of(cls, matrix: Any) -> Pattern:
        """The non-zeros of a `matrix` (p, n), NumPy's or SciPy's."""
        rows, columns = matrix.nonzero()
        return cls(tuple(matrix.shape), rows, columns)

    def __repr__(self) -> str:
        return f"Pattern({self.shape[0]} × {self.shape[1]}, {self.count} entries)"

    @property
    def count(self) -> int:
        """How many entries."""
        return len(self.rows)

    @property
    def bandwidths(self) -> tuple[int, int]:
        """How far below the main diagonal there are entries, and how far above it."""
        below = self.rows - self.columns
        return int(below.max(initial=0)), int((-below).max(initial=0))

    @property
    def is_diagonal(self) -> bool:
        """Whether it is square, with no entry beside the main diagonal."""
        return self.shape[0] == self.shape[1] and self.bandwidths == (0, 0)

    def transpose(self) -> Pattern:
        """Of the transposed matrix."""
        return Pattern((self.shape[1], self.shape[0]), self.columns, self.rows)

    def after(self, first: Pattern) -> Pattern:
        """Of the product self · first."""
        return Pattern.of(self.sparse() @ first.sparse())

    def sparse(self) -> Any:
        """As a SciPy array of ones (SciPy comes with JAX)."""
        import scipy.sparse

        return scipy.sparse.csr_array((np.ones(self.count, np.int64), (self.rows, self.columns)), shape=self.shape)

    @functools.cached_property
    def colours(self) -> np.ndarray:
        """For every column a colour; columns of one colour have no row in common. Greedy, in the order of the columns."""
        conflicts = (self.sparse().T @ self.sparse()).tocsr()
        found = np.full(self.shape[1], -1)
        for column in range(self.shape[1]):
            taken = found[conflicts.indices[conflicts.indptr[column] : conflicts.indptr[column + 1]]]
            free = np.ones(len(taken) + 1, bool)
            free[taken[(taken >= 0) & (taken < len(free))]] = False
            found[column] = int(free.argmax())
        return found


@dataclass(frozen=True)
class Evidence:
    """What is proved of the blocks that a step's Jacobian falls into, all of them together.

    Attributes:
        shape: (p, n) of a block.
        pattern: where an entry of a (p, n) block may be non-zero in any of them, as integers; None if that is not known.
        moves: every entry that may be non-zero is 1.
        rank: the size of a bottleneck that everything but an elementwise part passes through; None if none is known.
        factors: the shapes of two matrices that act on a matrix state from the left and from the right.
        scaled: and an elementwise scale does on one side.

    Example:
        >>> from parscan.jacobians import Evidence
        >>> parscan.Diagonal.recognised(Evidence((2, 2), parscan.Pattern((2, 2), [0, 1], [0, 1]))).kind.__name__
        'Diagonal'
    """

    shape: tuple[int, int]
    pattern: Pattern | None = None
    moves: bool = False
    rank: int | None = None
    factors: tuple[tuple[int, int], tuple[int, int]] | None = None
    scaled: bool = False

    def transpose(self) -> Evidence:
        """Of the transposed blocks."""
        factors = None if self.factors is None else (self.factors[0][::-1], self.factors[1][::-1])
        return replace(self, shape=self.shape[::-1], pattern=None if self.pattern is None else self.pattern.transpose(), factors=factors)


@dataclass(frozen=True)
class Form:
    """How the Jacobians of one kind are formed: by pushing seeds, sums of basis vectors, through the step.

    Attributes:
        kind: the class.
        shape: (p, n) of the Jacobian.
        colours: integers (n,), for every column the seed that it is in; entries of the columns of one seed are told apart by their rows. None if
            nothing is pushed.
        static: whatever else the kind needs to know, a hashable value; None if nothing. As for `colours`, no array.

    Source: A. R. Curtis, M. J. D. Powell, J. K. Reid, On the estimation of sparse Jacobian matrices (IMA J. Appl. Math. 13, 1974), for colours.

    Example:
        >>> from parscan.jacobians import Form, Index
        >>> Form(parscan.Dense, (2, 2), Index([0, 1])).seeds().astype(int)
        array([[1, 0],
               [0, 1]])
    """

    kind: type[Jacobian]
    shape: tuple[int, int]
    colours: Index | None
    static: Any = None

    @property
    def pushes(self) -> int:
        """How many seeds."""
        return 0 if self.colours is None else int(self.colours.values.max(initial=-1)) + 1

    def seeds(self) -> np.ndarray:
        """The seeds, (pushes, n)."""
        return np.zeros((0, self.shape[1])) if self.colours is None else np.arange(self.pushes)[:, None] == self.colours.values

    def abstract(self, dtype: Any = jnp.float32) -> Any:
        """The Jacobian that comes out in this `dtype`, with shapes in the place of arrays."""
        return self.kind.abstract(self, dtype)


def dot(matrix: Array, vector: Array) -> Array:
    """(..., p, n) times (..., n); a leading axis of length 1 of the matrix stands for any length."""
    if matrix.shape[-1] <= UNROLLED:
        return (matrix * vector[..., None, :]).sum(-1)
    if matrix.ndim > 2 and matrix.shape[-3] == 1 and vector.ndim > 1 and vector.shape[-2] > 1:  # one matrix for many vectors: a single product
        return jnp.matmul(vector, matrix[..., 0, :, :].swapaxes(-1, -2), precision=lax.Precision.HIGHEST)
    return jnp.einsum("...ij,...j->...i", matrix, vector, precision=lax.Precision.HIGHEST)


def balanced_columns(matrix: Array, rows: Array | None) -> tuple[Array, Array]:
    """2^rows · matrix as mantissa · 2^e, every column of the mantissa having its largest entry in [1/2, 1).

    Exact, but for entries 2^126 below their column's largest.

    Args:
        matrix: floating-point array of shape (..., p, n).
        rows: int32 (..., p), or None for zeros.

    Returns:
        the mantissa, (..., p, n) in the dtype of `matrix`, and e, int32 (..., n).

    Example:
        >>> parscan.jacobians.balanced_columns(jnp.array([[8.0, 0.25]]), None)
        (Array([[0.5, 0.5]], dtype=float32), Array([ 4, -1], dtype=int32))
    """
    return entries_balanced(matrix, None if rows is None else rows[..., :, None])


def entries_balanced(matrix: Array, shift: Array | None) -> tuple[Array, Array]:
    """The same for 2^shift ∘ matrix; shift int32, of a shape that broadcasts with the matrix, or None."""
    each = exponents.exponent(matrix) if shift is None else exponents.exponent(matrix) + shift
    top = each.max(-2) if matrix.shape[-2] else jnp.zeros((*each.shape[:-2], each.shape[-1]), jnp.int32)
    top = jnp.where(top < exponents.NONE // 2, 0, top)
    return exponents.scaled(matrix, (0 if shift is None else shift) - top[..., None, :]), top

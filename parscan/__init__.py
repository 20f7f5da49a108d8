from parscan.jacobians import BlockDiagonal, Dense, Diagonal
from parscan.methods import Associative, Chunked, Lax, Sequential, Tree, Walk
from parscan.recurrence import scan
from parscan.structure import Blocks

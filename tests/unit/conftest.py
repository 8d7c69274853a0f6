from tests.support.composing import cached_composition as cached_composition

from tests.support.composing import composed_once as composed_once

"""Reading the text parts of ``/api/show``; its tensors are tested with the catalog."""

from proxy.models.show import Files, parse_modelfile, parse_parameters


def test_the_head_of_a_modelfile():
    """Weights, adapters, draft, projectors; a template that contains such lines adds nothing."""
    text = '# comment\n\nFROM /a b/1\nADAPTER /2\nDRAFT /3\nFROM /4\nFROM /5\nTEMPLATE """\nFROM /6\n"""\nADAPTER /7\n'
    assert parse_modelfile(text) == Files(model="/a b/1", projectors=("/4", "/5"), adapters=("/2",), draft="/3")
    assert parse_modelfile("") == Files()


def test_parameters_in_gos_notation():
    """Integers, also as Go writes them from 10^6 on, floats, booleans, quoted text, repeated options."""
    text = (
        "num_ctx                        131072\nnum_predict                    1.048576e+06\ntemperature                    0.7\n"
        'stop                           "a\\n\\"b\\""\nstop                           "\\x00"\n'
        "use_mmap                       true\n"
        "top_p                          1\nnonsense\n"
    )
    assert parse_parameters(text) == {
        "num_ctx": 131072,
        "num_predict": 1048576,
        "temperature": 0.7,
        "stop": ('a\n"b"', "\\x00"),
        "use_mmap": True,
        "top_p": 1,
    }

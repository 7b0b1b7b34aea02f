"""Known answers of the forms `hg1` and `hgc1`: a release that changes one cannot open old content.

Origin: made by this code, once, and recomputed by hand from RFC 5869 and NIST SP 800-38D with
`cryptography`'s HKDFExpand and AESGCM.
"""

from __future__ import annotations

HG1_VECTORS: tuple[dict[str, str], ...] = (
    {
        "name": "empty text, empty place",
        "key": "c0a4b48a496a62c8095145dfa7668a42753953911fe704ea0adbd78367164734",
        "salt": "55bafcd39e61f759923d23d06fdf4a6d",
        "associated": "",
        "plaintext": "",
        "message": (
            "55bafcd39e61f759923d23d06fdf4a6d2adaf31853089ae620cee5a551b1a6c20d6644fd8e2984ea"
            "7a6f0e5524b2555ca7fd9f41724ff18b42cb4d28509b9006"
        ),
    },
    {
        "name": "one field",
        "key": "a33166e6c13065edc005ed16bd9e44d6b644479eb3920257e3dbd28af34fec21",
        "salt": "e73cbb9d7a655e09470fafbb2e8ac974",
        "associated": (
            "00000008636c696e69632d6100000003746167000000036568720000000c50617469656e742e6e61"
            "6d650000000131"
        ),
        "plaintext": "416461204578616d706c65",
        "message": (
            "e73cbb9d7a655e09470fafbb2e8ac9740f11fc739b7a540b1343722bef6897e26f0f50f7eed9e783"
            "33c0f7109e0917f029a80a9c4f7e23eb357504707b9adbf6b78ca140334c98c461755b"
        ),
    },
    {
        "name": "several blocks",
        "key": "85641c47c8a18686040dd4ffd321316aa65bc73f8222e49ffc2a3e7902a6d6f3",
        "salt": "313883dc91fb9291b0b89766c6e57eaa",
        "associated": "706c616365",
        "plaintext": (
            "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f2021222324252627"
            "28292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f"
            "505152535455565758595a5b5c5d5e5f60616263"
        ),
        "message": (
            "313883dc91fb9291b0b89766c6e57eaa75f711f76c6a3bd16ec570769ea7407149bcd63608864a02"
            "355df9c0ec5a98d90b3b0380634de9f02e468799a9680a956da67fa3124f4a805580253ca8a15314"
            "addb87782c8f2725ed884b6255cdf1b8cc032a663ed1597764780c85fd8f50545000ff16e8a7fbfc"
            "6b289a24eb9fffce2a9c4111c552df676c2c3ef69d18bfe8d025e199138cc470ae21983a70aff1ae"
            "c0559f4a"
        ),
    },
)

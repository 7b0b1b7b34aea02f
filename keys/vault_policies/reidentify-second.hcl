# An officer who opens the second half of a pseudonym. Nobody holds both halves.
path "${prefix}/transit/decrypt/reid-second" { capabilities = ["update"] }

# Whoever runs studies has the certificate renewed that the SuperLink's HTTP port asks for.
path "${prefix}/pki/sign/coordinator" { capabilities = ["update"] }

"""Stand-ins for vendors' kernel packages: real import paths and signatures, right answers in torch. See README.md."""

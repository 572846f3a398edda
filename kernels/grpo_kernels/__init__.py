"""Operations with a plain JAX reference each and, where it pays, a Pallas kernel for TPU or GPU; `kernels/README.md` lists them."""

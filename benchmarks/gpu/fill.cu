// Fills GPUs until only so much is free, then sleeps:
//     nvcc -O2 -o fill fill.cu && ./fill 0 32000 1 24000      # device, MiB to leave, …
#include <cstdio>
#include <cstdlib>
#include <unistd.h>

int main(int count, char **words) {
  for (int i = 1; i + 1 < count; i += 2) {
    cudaSetDevice(atoi(words[i]));
    const size_t leave = (size_t)atol(words[i + 1]) << 20;
    size_t free_bytes, total_bytes;
    void *block;
    while (cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess && free_bytes >= leave + (2u << 20)) {
      const size_t more = free_bytes - leave;
      if (cudaMalloc(&block, more < (1ull << 30) ? more : 1ull << 30) != cudaSuccess) break;
    }
    printf("device %s: %zu MiB free\n", words[i], free_bytes >> 20);
    fflush(stdout);
  }
  pause();
}

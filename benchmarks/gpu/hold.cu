// Holds a GPU back from inside llama-server's process, so that it runs like a smaller one:
//     nvcc -O2 -shared -Xcompiler -fPIC -o hold.so hold.cu
//     LD_PRELOAD=./hold.so HOLD=1:126 llama-server …
// keeps 126 SMs of the process's device 1 busy with short kernels whose blocks take a whole SM's shared memory each.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

static std::atomic<bool> ended{false};

__global__ void spin(long long cycles) {
  extern __shared__ char memory[];
  if (threadIdx.x == 0) memory[0] = 1;
  const long long start = clock64();
  while (clock64() - start < cycles) __nanosleep(500);
}

static void hold(int device, int sms) {
  const char *given = getenv("HOLD_CYCLES");
  const long long cycles = given ? atoll(given) : 1000000LL;
  const int shared_bytes = 220 * 1024;
  if (cudaSetDevice(device) != cudaSuccess) return;  // a start that sees fewer devices
  cudaFuncSetAttribute(spin, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  int least, greatest;
  cudaDeviceGetStreamPriorityRange(&least, &greatest);
  cudaStream_t stream;
  cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest);
  cudaEvent_t done[2];
  for (cudaEvent_t &event : done) cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync);
  fprintf(stderr, "hold: %d SMs of device %d\n", sms, device);
  for (long i = 0; !ended; i++) {  // two launches in flight, so that the SMs are never free
    if (i >= 2) cudaEventSynchronize(done[i & 1]);
    spin<<<sms, 32, shared_bytes, stream>>>(cycles);
    cudaEventRecord(done[i & 1], stream);
  }
}

__attribute__((constructor)) static void begin() {
  int device, sms;
  const char *given = getenv("HOLD");
  if (given && sscanf(given, "%d:%d", &device, &sms) == 2 && sms > 0) std::thread(hold, device, sms).detach();
}

__attribute__((destructor)) static void end() { ended = true; }
